// Device functions that the kernels share. A block has (32, warps) threads; a warp's lanes hold neighbouring channels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "kernels/depthwise.h"

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

// For 16-bit elements the errors of the fast functions stay below the elements' rounding error. They flush denormal
// numbers to zero: the code that keeps them takes longer than the function.

#ifdef __CUDACC__
/// 2 to the power x.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float fast_reciprocal_sqrt(float x) {
  float y;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
inline float fast_exp2(float x) {
  return std::exp2(x);
}
inline float fast_log2(float x) {
  return std::log2(x);
}
inline float fast_reciprocal(float x) {
  return 1.0f / x;
}
inline float fast_reciprocal_sqrt(float x) {
  return 1.0f / std::sqrt(x);
}
#endif

constexpr float log2_of_e = 1.4426950408889634f, log_of_2 = 0.6931471805599453f;

template <typename T, typename Acc>
__device__ __forceinline__ Acc sigmoid_of(Acc x) {
  if constexpr (sizeof(T) == 2)
    return fast_reciprocal(1.0f + fast_exp2(-log2_of_e * x));
  else
    return sigmoid(x);
}

/// Applies the activation to all values.
template <typename T, typename Acc, int count>
__device__ __forceinline__ void activate_all(Activation activation, Acc (&value)[count]) {
  if (activation == Activation::relu) {
#pragma unroll
    for (int i = 0; i < count; ++i)
      value[i] = activate(Activation::relu, value[i]);
  } else if (activation == Activation::silu) {
#pragma unroll
    for (int i = 0; i < count; ++i)
      value[i] *= sigmoid_of<T>(value[i]);
  }
}

/// Replaces each value by its part of the gradient: gradient * d activation / d value.
template <typename T, typename Acc, int count>
__device__ __forceinline__ void differentiate_all(Activation activation, const Acc (&gradient)[count],
                                                  Acc (&value)[count]) {
  if (activation == Activation::silu) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Acc s = sigmoid_of<T>(value[i]);
      value[i] = gradient[i] * (s * (Acc(1) + value[i] * (Acc(1) - s)));
    }
  } else {
    const bool relu = activation == Activation::relu;
#pragma unroll
    for (int i = 0; i < count; ++i)
      value[i] = relu && !(value[i] > Acc(0)) ? Acc(0) : gradient[i];
  }
}

/// Adjacent elements that a thread loads and stores together.
template <typename T, int count>
struct alignas(sizeof(T) * count) Channels {
  T value[count];
};

/// The built-in type of so many bytes. The compiler loads and stores it in one instruction, but an array of 16-bit
/// elements one by one.
template <size_t bytes>
using Word =
    std::conditional_t<bytes == 16, uint4,
                       std::conditional_t<bytes == 8, uint2, std::conditional_t<bytes == 4, uint32_t, uint16_t>>>;

template <typename T, int count>
__device__ __forceinline__ Channels<T, count> load_channels(const T* from) {
  using Type = Word<sizeof(T) * count>;
  const Type word = *reinterpret_cast<const Type*>(from);
  Channels<T, count> channels;
  memcpy(&channels, &word, sizeof(word));
  return channels;
}

#ifdef __CUDACC__
// In assembly, because the compiler takes a store of 16-bit elements apart.
__device__ __forceinline__ void store_word(uint4* to, uint4 word) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
__device__ __forceinline__ void store_word(uint2* to, uint2 word) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
}
#endif
template <typename Type>
__device__ __forceinline__ void store_word(Type* to, Type word) {
  *to = word;
}

/// To global memory.
template <typename T, int count>
__device__ __forceinline__ void store_channels(T* to, const Channels<T, count>& channels) {
  using Type = Word<sizeof(T) * count>;
  Type word;
  memcpy(&word, &channels, sizeof(word));
  store_word(reinterpret_cast<Type*>(to), word);
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
