// What every kernel source needs: function qualifiers for host and device, and the element types.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOBILEMAMBA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the file of each instruction set includes these functions, and the linker keeps one copy of a
// function that is not inlined. The copy for AVX-512 does not run on other machines.
#define MOBILEMAMBA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mobilemamba {

/// Element types of the operators. Sums and states are float64 for float64 elements, and float32 for the others.
enum class DType { float32, float64, float16, bfloat16 };

/// The accumulator type for elements of type T.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};

/// Bytes of a value of the accumulator type.
MOBILEMAMBA_HOST_DEVICE int64_t accumulate_bytes(DType type) {
  return type == DType::float64 ? 8 : 4;
}

/// For sizes within the bounds of ops/common.h.
MOBILEMAMBA_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace mobilemamba
