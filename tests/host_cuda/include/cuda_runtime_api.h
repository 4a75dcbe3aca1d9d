// Stands in for the CUDA runtime: the host compiler builds the .cu files with it, and the tests run them without a GPU.
//
// Blocks run one after another. The threads of a block are fibres. From one barrier or shuffle to the next they run in
// a random order; a warp runs until all its threads are at a block barrier, then another warp runs. Shared memory is
// NaN when a block begins, and AddressSanitizer knows its end. A grid has at most a few blocks, which loop over its
// tasks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);

// These belong to the thread that is running.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp();

namespace host_cuda {
/// Runs the kernel for every thread of the grid.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, const std::function<void()>& kernel);
/// The only stream that launches may go to.
inline const cudaStream_t current_stream = reinterpret_cast<cudaStream_t>(64);
/// Gives `bits` to the warp and returns the bits of the lane whose index is this lane's XOR `mask`.
uint64_t exchange(unsigned lanes, uint64_t bits, int mask);
}  // namespace host_cuda

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = host_cuda::exchange(lanes, bits, mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return host_cuda::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}
