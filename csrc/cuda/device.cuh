// Device functions that the kernels share. A block has (32, warps) threads; a warp's lanes hold neighbouring channels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "kernels/common.h"

namespace mobilemamba::cuda {

/// Dynamic shared memory of the block.
extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T narrow(typename AccumulateOf<T>::type x) {
  if constexpr (sizeof(T) != 2)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

/// Calls run<T>() for an element type.
template <typename Run>
cudaError_t for_type(DType type, Run run) {
  switch (type) {
    case DType::float32:
      return run.template operator()<float>();
    case DType::float64:
      return run.template operator()<double>();
    case DType::float16:
      return run.template operator()<__half>();
    case DType::bfloat16:
      return run.template operator()<__nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

/// Sums each value[i] over the warp; lane l returns the sum of value[l / (32 / count)]. In each step a lane keeps half
/// of its values and sends the other half to its partner, so that 8 sums take 9 shuffles instead of 40.
template <int count, int distance = 16, typename V, int capacity>
__device__ __forceinline__ V warp_sums(V (&value)[capacity]) {
  constexpr unsigned all = 0xffffffff;
  if constexpr (count == 1) {
#pragma unroll
    for (int d = distance; d >= 1; d /= 2)
      value[0] += __shfl_xor_sync(all, value[0], d);
    return value[0];
  } else {
    static_assert(count <= 2 * distance && count % 2 == 0);
    const bool upper = threadIdx.x & distance;
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const V given = upper ? value[i] : value[i + count / 2];
      const V kept = upper ? value[i + count / 2] : value[i];
      value[i] = kept + __shfl_xor_sync(all, given, distance);
    }
    return warp_sums<count / 2, distance / 2>(value);
  }
}

}  // namespace mobilemamba::cuda
