// Tensor cores and asynchronous copies to shared memory, one function for each instruction; sm_80 and later. The tests'
// stand-in for the CUDA runtime has the same functions for the host.
#pragma once

#include "cuda/device.cuh"

namespace mobilemamba::cuda {

#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)

/// An address in shared memory as the instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/// Copies 16 bytes to shared memory while the thread goes on. Only the first `bytes` are read; the others become zero.
/// Both addresses are multiples of 16, that of the source also where nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

/// Closes a group: the thread's copies since the last call.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most the last `groups` groups of the thread are under way. Other threads see the copies after a
/// barrier.
template <int groups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

/// Loads four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and gets the
/// elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4 of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

/// sum += a * b for a (16 x 16) and b (16 x 8) of 16-bit elements, two in each register. With g = lane / 4 and
/// q = 2 * (lane % 4), a lane has of `a` the elements q and q + 1 of row g, those of row g + 8, then the elements q + 8
/// and q + 9 of the same rows; of `b` the elements q and q + 1 of column g, then q + 8 and q + 9; of `sum` the columns
/// q and q + 1 of row g, then of row g + 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#elif defined(__CUDACC__)  // sm_75: the host launches none of the kernels that call these

__device__ __forceinline__ void copy_async(void*, const void*, int) {
  __trap();
}
__device__ __forceinline__ void commit_copies() {}
template <int groups>
__device__ __forceinline__ void wait_for_copies() {}
__device__ __forceinline__ void load_matrices(uint32_t (&)[4], const void*) {}
template <typename T>
__device__ __forceinline__ void multiply_add(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}

#else  // on the host, by the stand-in

using host_cuda::commit_copies, host_cuda::copy_async, host_cuda::load_matrices, host_cuda::wait_for_copies;

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host_cuda::multiply_add<T>(sum, a, b);
}

#endif

}  // namespace mobilemamba::cuda
