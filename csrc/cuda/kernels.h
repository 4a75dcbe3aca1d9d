// The CUDA kernels as the operators see them: launches that return an error code. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/scan.h"

namespace mobilemamba::cuda {

/// Bytes of shared memory that a block needs: it grows with R and N, and must not exceed what the device can opt in to.
size_t scan_forward_shared_bytes(const ScanForward& p);
/// Bytes of device memory that the launch needs as scratch.
size_t scan_forward_scratch_bytes(const ScanForward& p);
cudaError_t scan_forward(const ScanForward& p, void* scratch, cudaStream_t stream);

}  // namespace mobilemamba::cuda
