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
#include <string>

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

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
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
cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, const std::function<void()>& kernel,
                   const std::string& parameters);
/// The only stream that launches may go to.
inline const cudaStream_t current_stream = reinterpret_cast<cudaStream_t>(64);
/// Gives `bits` to the warp and returns the bits of the lane whose index is this lane's XOR `mask`.
uint64_t exchange(unsigned lanes, uint64_t bits, int mask);

// The instructions of cuda/tensor_core.cuh. A copy to shared memory happens when its thread waits for it: memory that
// is read without waiting is NaN, or what was there before.
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int groups);
template <int groups>
void wait_for_copies() {
  wait_for_copies(groups);
}
void load_matrices(uint32_t (&to)[4], const void* shared_row);
/// The words of all lanes, once the whole warp has called this.
const uint64_t (&gather(const uint64_t (&words)[3]))[3][32];

void count_product();

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef HOST_CUDA_COUNTERS
  count_product();
  asm volatile(""  // uses what the instruction uses
               : "+x"(sum[0]), "+x"(sum[1]), "+x"(sum[2]), "+x"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const uint64_t words[3] = {a[0] | uint64_t(a[1]) << 32, a[2] | uint64_t(a[3]) << 32, b[0] | uint64_t(b[1]) << 32};
  const auto& all = gather(words);
  const auto element = [](uint64_t word, int i) {  // of four
    const uint16_t bits = static_cast<uint16_t>(word >> 16 * i);
    T x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
  };
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2, lower = i / 2;  // row + 8 * lower
    // By the PTX ISA's tables of fragments.
    for (int k = 0; k < 16; ++k) {
      const float x = element(all[k / 8][row * 4 + k % 8 / 2], lower * 2 + k % 2);
      const float y = element(all[2][column * 4 + k % 8 / 2], k / 8 * 2 + k % 2);
      sum[i] += x * y;
    }
  }
#endif
}
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
  std::string bytes;
  (bytes.append(reinterpret_cast<const char*>(&arguments), sizeof(arguments)), ...);
  // What the call reads is no access of the kernel.
  const auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
  return host_cuda::launch(*config, reinterpret_cast<const void*>(kernel), call, bytes);
}
