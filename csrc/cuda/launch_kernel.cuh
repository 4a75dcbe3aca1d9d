// The launch of a kernel with the configuration that launch.h chose.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace mobilemamba::cuda {

/// Launches `kernel` with a block for each task, up to the largest grid.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& launch, cudaStream_t stream,
                          const Arguments&... arguments) {
  if (launch.shared_bytes > 48 * 1024) {  // a kernel must ask for more than 48 KiB
    int device = 0, limit = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    // The limit is the same for every launch on a device: other threads may be launching the same kernel.
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(clamp(limit, 0, stage_budget)));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clamp(launch.tasks, 1, 0x7fffffff)));
  config.blockDim = dim3(warp_size, launch.warps);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace mobilemamba::cuda
