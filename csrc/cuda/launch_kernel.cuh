// The launch of a kernel with the configuration that launch.h chose.
#pragma once

#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <utility>

#include "cuda/launch.h"

namespace mobilemamba::cuda {

/// A kernel must ask before it is launched with more than 48 KiB of shared memory. It asks once on each device, for as
/// much as any launch there may have: other threads may be launching it at the same time.
inline cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0, limit = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel})) return cudaSuccess;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess) allowed.emplace(device, kernel);
  return error;
}

/// Launches `kernel` with a block for each task, up to the largest grid.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& launch, cudaStream_t stream,
                          const Arguments&... arguments) {
  if (launch.shared_bytes > 48 * 1024)
    if (const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel))) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clamp(launch.tasks, 1, 0x7fffffff)));
  config.blockDim = dim3(warp_size, launch.warps);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace mobilemamba::cuda
