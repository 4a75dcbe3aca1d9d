// A vector of channels as wide as a register, in the vector extension of GCC and clang, with the functions that the
// kernels call.
//
// Each instruction set includes this file once, in its own namespace, after the target pragma. The linker must see no
// function here that another instruction set has too, or it would keep one copy for both: all functions are always
// inlined, and there are no templates of std.
#pragma once

#include "kernels/common.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

MOBILEMAMBA_HOST_DEVICE int64_t min(int64_t a, int64_t b) {
  return a < b ? a : b;
}
MOBILEMAMBA_HOST_DEVICE int64_t max(int64_t a, int64_t b) {
  return a < b ? b : a;
}

template <typename T, typename Int>
struct VecBase {
  typedef T Raw __attribute__((vector_size(MOBILEMAMBA_CPU_VECTOR_BYTES)));
  typedef Int RawInt __attribute__((vector_size(MOBILEMAMBA_CPU_VECTOR_BYTES)));
  static constexpr int size = MOBILEMAMBA_CPU_VECTOR_BYTES / sizeof(T);
  Raw raw;
};

template <typename T>
struct Vec;

// x - 0 keeps the sign of -0 and folds to x; 0 + x would turn -0 into +0.
template <>
struct Vec<float> : VecBase<float, int32_t> {
  Vec() = default;
  explicit Vec(float x) : VecBase{x - Raw{}} {}
  explicit Vec(Raw x) : VecBase{x} {}
};

template <>
struct Vec<double> : VecBase<double, int64_t> {
  Vec() = default;
  explicit Vec(double x) : VecBase{x - Raw{}} {}
  explicit Vec(Raw x) : VecBase{x} {}
};

#define MOBILEMAMBA_VEC_OPERATOR(op)                               \
  template <typename T>                                            \
  MOBILEMAMBA_HOST_DEVICE Vec<T> operator op(Vec<T> a, Vec<T> b) { \
    return Vec<T>(a.raw op b.raw);                                 \
  }                                                                \
  template <typename T>                                            \
  MOBILEMAMBA_HOST_DEVICE Vec<T> operator op(Vec<T> a, T b) {      \
    return Vec<T>(a.raw op b);                                     \
  }
MOBILEMAMBA_VEC_OPERATOR(+)
MOBILEMAMBA_VEC_OPERATOR(-)
MOBILEMAMBA_VEC_OPERATOR(*)
MOBILEMAMBA_VEC_OPERATOR(/)
#undef MOBILEMAMBA_VEC_OPERATOR

template <typename T>
MOBILEMAMBA_HOST_DEVICE Vec<T> operator-(Vec<T> a) {
  return Vec<T>(-a.raw);
}

template <typename T>
struct Mask {
  typename Vec<T>::RawInt raw;
};

template <typename T>
MOBILEMAMBA_HOST_DEVICE Mask<T> operator<(Vec<T> a, Vec<T> b) {
  return {a.raw < b.raw};
}

template <typename T>
MOBILEMAMBA_HOST_DEVICE Vec<T> select(Mask<T> mask, Vec<T> a, Vec<T> b) {
  return Vec<T>(mask.raw ? a.raw : b.raw);
}

/// The greater of the two; `a` if either is NaN.
template <typename T>
MOBILEMAMBA_HOST_DEVICE Vec<T> max(Vec<T> a, Vec<T> b) {
  return select(a < b, b, a);
}

template <typename T>
MOBILEMAMBA_HOST_DEVICE Vec<T> abs(Vec<T> a) {
  typedef typename Vec<T>::RawInt Bits;
  const Bits sign = (Bits)Vec<T>(T(-0.0)).raw;
  return Vec<T>((typename Vec<T>::Raw)((Bits)a.raw & ~sign));
}

/// The given lanes of a followed by b. GCC has __builtin_shufflevector from 12 on; clang has no __builtin_shuffle.
template <int... lanes, typename T>
MOBILEMAMBA_HOST_DEVICE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#if __has_builtin(__builtin_shufflevector)
  return Vec<T>(__builtin_shufflevector(a.raw, b.raw, lanes...));
#else
  return Vec<T>(__builtin_shuffle(a.raw, b.raw, typename Vec<T>::RawInt{lanes...}));
#endif
}

template <typename T>
MOBILEMAMBA_HOST_DEVICE T sum(Vec<T> a) {
  T lanes[Vec<T>::size];
  __builtin_memcpy(lanes, &a.raw, sizeof lanes);
  for (int width = Vec<T>::size / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      lanes[i] += lanes[i + width];
  return lanes[0];
}

/// e^r to about 1 ulp for |r| <= ln 2 / 2.
MOBILEMAMBA_HOST_DEVICE Vec<float> exp_of_remainder(Vec<float> r) {
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

/// e^x to about 1 ulp: x = n ln 2 + r, a polynomial for e^r, n into the exponent. Overflows to infinity, underflows to
/// zero below x = -87.3, where the result would be subnormal.
MOBILEMAMBA_HOST_DEVICE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V low = V(-87.33654f), high = V(88.72284f);
  const V clamped = select(x < low, low, select(high < x, high, x));
  const V magic = V(12582912.0f);  // 1.5 * 2^23: adding and subtracting it rounds to the nearest integer
  const V n = clamped * 1.44269504f + magic - magic;
  const V p = exp_of_remainder(clamped - n * 0.693359375f - n * -2.12194440e-4f);
  // 2^n in two factors, because 2^128 is no float32
  const V::RawInt whole = __builtin_convertvector(n.raw, V::RawInt), half = whole >> 1;
  const V::RawInt first = (half + 127) << 23, second = (whole - half + 127) << 23;
  const V y = V(p.raw * (V::Raw)first * (V::Raw)second);
  return select(high < x, V(__builtin_inff()), select(x < low, V(0.0f), y));
}

/// e^x for x <= 0, in half the time: without overflow, and with 2^n as one factor.
MOBILEMAMBA_HOST_DEVICE Vec<float> exp_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  const V low = V(-87.33654f), magic = V(12582912.0f);
  const Mask<float> underflow = x < low;
  const V clamped = select(underflow, low, x);
  const V sum = clamped * 1.44269504f + magic, n = sum - magic;  // the low bits of the sum are n
  const V p = exp_of_remainder(clamped - n * 0.693359375f - n * -2.12194440e-4f);
  const V::RawInt power = ((V::RawInt)sum.raw + 127) << 23;
  return select(underflow, V(0.0f), V(p.raw * (V::Raw)power));
}

/// log(1 + x) for x in [0, 1], to about 1 ulp, as 2 atanh(x / (2 + x)).
MOBILEMAMBA_HOST_DEVICE Vec<float> log1p(Vec<float> x) {
  const Vec<float> s = x / (x + 2.0f), s2 = s * s;
  Vec<float> p = s2 * 0.0769230769f + 0.0909090909f;
  p = p * s2 + 0.1111111111f;
  p = p * s2 + 0.1428571429f;
  p = p * s2 + 0.2f;
  p = p * s2 + 0.3333333333f;
  p = p * s2 * s + s;
  return p + p;
}

MOBILEMAMBA_HOST_DEVICE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < x.size; ++i)
    x.raw[i] = __builtin_exp(x.raw[i]);
  return x;
}

MOBILEMAMBA_HOST_DEVICE Vec<double> exp_nonpositive(Vec<double> x) {
  return exp(x);
}

MOBILEMAMBA_HOST_DEVICE Vec<double> log1p(Vec<double> x) {
  for (int i = 0; i < x.size; ++i)
    x.raw[i] = __builtin_log1p(x.raw[i]);
  return x;
}

// 16-bit elements ---------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

typedef uint16_t Bits16 __attribute__((vector_size(MOBILEMAMBA_CPU_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(MOBILEMAMBA_CPU_VECTOR_BYTES)));

/// The elements as the low halves of the lanes. GCC 12 takes a conversion of 64 bits apart into scalars on aarch64.
MOBILEMAMBA_HOST_DEVICE Bits32 extend(Bits16 packed) {
#ifdef __aarch64__
  return (Bits32)vmovl_u16((uint16x4_t)packed);
#else
  return __builtin_convertvector(packed, Bits32);
#endif
}

MOBILEMAMBA_HOST_DEVICE Vec<float> widen(Bits16 packed, BFloat16) {
  return Vec<float>((Vec<float>::Raw)(extend(packed) << 16));
}

/// Rounds to nearest even. NaN stays NaN.
MOBILEMAMBA_HOST_DEVICE Bits16 narrow(Vec<float> x, BFloat16) {
#ifdef MOBILEMAMBA_CPU_ROUNDS_TO_BFLOAT16  // one instruction, which flushes subnormal values to zero
  return (Bits16)_mm512_cvtneps_pbh((__m512)x.raw);
#endif
  const Bits32 bits = (Bits32)x.raw;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 nan = (bits >> 16) | 0x40;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Bits16);
}

#ifdef __aarch64__

// Both round to nearest even and keep NaN.
MOBILEMAMBA_HOST_DEVICE Vec<float> widen(Bits16 packed, Half) {
  return Vec<float>((Vec<float>::Raw)vcvt_f32_f16((float16x4_t)packed));
}
MOBILEMAMBA_HOST_DEVICE Bits16 narrow(Vec<float> x, Half) {
  return (Bits16)vcvt_f16_f32((float32x4_t)x.raw);
}

#else

MOBILEMAMBA_HOST_DEVICE Vec<float> widen(Bits16 packed, Half) {
  const Bits32 bits = extend(packed), magnitude = bits & 0x7fff;
  // The exponents' biases differ by 112. A multiplication by 2^112 is right for subnormal values too.
  const Bits32 finite = (Bits32)((Vec<float>::Raw)(magnitude << 13) * 0x1p112f);
  const Bits32 special = (magnitude << 13) | 0x7f800000;
  return Vec<float>((Vec<float>::Raw)((magnitude >= 0x7c00 ? special : finite) | ((bits & 0x8000) << 16)));
}

/// Rounds to nearest even, and to infinity beyond the range. NaN stays NaN.
MOBILEMAMBA_HOST_DEVICE Bits16 narrow(Vec<float> x, Half) {
  const Bits32 bits = (Bits32)x.raw, magnitude = bits & 0x7fffffff;
  const Bits32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: a float32 near 0.5 has the spacing of half's subnormal values, so the sum rounds to them.
  const Bits32 subnormal = (Bits32)((Vec<float>::Raw)magnitude + 0.5f) - 0x3f000000;
  Bits32 result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000 ? Bits32{} + 0x7c00 : result;
  result = magnitude > 0x7f800000 ? Bits32{} + 0x7e00 : result;
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000), Bits16);
}

#endif

// Loads and stores of the first `count` lanes; a load sets the others to zero. A constant count is free.

/// Calls f(lane) for the first `count` lanes but the last one of a vector, for counts below `lanes`. Each lane is a
/// constant, so that the vector stays in a register. A call of memcpy takes it through memory.
template <int lanes, typename F>
MOBILEMAMBA_HOST_DEVICE void for_tail(int count, F f) {
#pragma GCC unroll 4
  for (int lane = 0; lane + 1 < lanes; ++lane)
    if (lane < count) f(lane);
}

template <typename T, typename Raw>
MOBILEMAMBA_HOST_DEVICE Raw load_raw(const T* from, int count) {
  Raw raw{};
  if (count * sizeof(T) == sizeof(Raw)) __builtin_memcpy(&raw, from, sizeof(Raw));
#if MOBILEMAMBA_CPU_VECTOR_BYTES == 64
  else if constexpr (sizeof(T) == 4)
    raw = (Raw)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#endif
  else if constexpr (MOBILEMAMBA_CPU_VECTOR_BYTES == 16)
    for_tail<sizeof(Raw) / sizeof(T)>(count, [&](int lane) __attribute__((always_inline)) {
      auto value = raw[0];
      __builtin_memcpy(&value, from + lane, sizeof(T));
      raw[lane] = value;
    });
  else
    __builtin_memcpy(&raw, from, count * sizeof(T));
  return raw;
}
template <typename T, typename Raw>
MOBILEMAMBA_HOST_DEVICE void store_raw(T* to, const Raw& raw, int count) {
  if (count * sizeof(T) == sizeof(Raw)) __builtin_memcpy(to, &raw, sizeof(Raw));
#if MOBILEMAMBA_CPU_VECTOR_BYTES == 64
  else if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)raw);
#endif
  else if constexpr (MOBILEMAMBA_CPU_VECTOR_BYTES == 16)
    for_tail<sizeof(Raw) / sizeof(T)>(count, [&](int lane) __attribute__((always_inline)) {
      const auto value = raw[lane];
      __builtin_memcpy(to + lane, &value, sizeof(T));
    });
  else
    __builtin_memcpy(to, &raw, count * sizeof(T));
}

MOBILEMAMBA_HOST_DEVICE Vec<float> load(const float* from, int count) {
  return Vec<float>(load_raw<float, Vec<float>::Raw>(from, count));
}
MOBILEMAMBA_HOST_DEVICE Vec<double> load(const double* from, int count) {
  return Vec<double>(load_raw<double, Vec<double>::Raw>(from, count));
}
template <typename T>
MOBILEMAMBA_HOST_DEVICE Vec<float> load(const T* from, int count) {
  return widen(load_raw<T, Bits16>(from, count), T{});
}

/// Keeps the values of earlier loads in registers. Without it the compilers load them again for every use.
MOBILEMAMBA_HOST_DEVICE void keep_loaded() {
  asm volatile("" ::: "memory");
}

/// `x` with zeros in the lanes from `count` on, even if they hold NaN.
template <typename T>
MOBILEMAMBA_HOST_DEVICE Vec<T> first_lanes(Vec<T> x, int count) {
  typename Vec<T>::RawInt lane{};
  for (int i = 0; i < Vec<T>::size; ++i)
    lane[i] = i;
  return select(Mask<T>{lane < count}, x, Vec<T>(T(0)));
}

MOBILEMAMBA_HOST_DEVICE void store(float* to, Vec<float> x, int count) {
  store_raw(to, x.raw, count);
}
MOBILEMAMBA_HOST_DEVICE void store(double* to, Vec<double> x, int count) {
  store_raw(to, x.raw, count);
}
template <typename T>
MOBILEMAMBA_HOST_DEVICE void store(T* to, Vec<float> x, int count) {
  store_raw(to, narrow(x, T{}), count);
}

template <typename Acc, typename T>
MOBILEMAMBA_HOST_DEVICE Acc load_one(const T* from) {
  if constexpr (sizeof(T) == 2)
    return load(from, 1).raw[0];
  else
    return *from;
}

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
