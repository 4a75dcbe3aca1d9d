// What every kernel source needs to compile for the host and for the device.
#pragma once

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

}  // namespace mobilemamba
