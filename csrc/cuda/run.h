// What the CUDA side of every operator needs of torch: device, stream, and errors in words.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

namespace mobilemamba::cuda {

/// Throws for an error of a launch. Where the library has no kernel for the device's arch, says how to get one.
void check_launch(cudaError_t error);

/// Makes the device of an operator's main argument the current one. Where that is elsewhere, the checks will say so.
class DeviceOf {
 public:
  explicit DeviceOf(const at::Tensor& main) : guard_(main.is_cuda() ? std::optional(main.device()) : std::nullopt) {}

 private:
  c10::cuda::OptionalCUDAGuard guard_;
};

/// Bytes of shared memory that the current device grants a block.
size_t shared_limit();

}  // namespace mobilemamba::cuda
