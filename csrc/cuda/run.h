// What the CUDA side of every operator needs of torch: device, stream, and errors in words.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace mobilemamba::cuda {

/// Throws for an error of a launch. Where the library has no kernel for the device's arch, says how to get one.
void check_launch(cudaError_t error);

/// Bytes of shared memory that the current device grants a block.
size_t shared_limit();

}  // namespace mobilemamba::cuda
