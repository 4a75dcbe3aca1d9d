// What every kernel source needs: function qualifiers for host and device, and the element types.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MOBILEMAMBA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: files for different instruction sets include these functions, and the linker must not pick one's
// copy for another.
#define MOBILEMAMBA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mobilemamba {

/// Element types of the operators. Sums and states are float32, for float64 elements float64.
enum class DType { float32, float64, float16, bfloat16 };

/// The type that sums over elements of type T are kept in.
template <typename T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};

/// Bytes of one number of the type that sums over elements are kept in.
MOBILEMAMBA_HOST_DEVICE int64_t accumulate_bytes(DType type) {
  return type == DType::float64 ? 8 : 4;
}

MOBILEMAMBA_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace mobilemamba
