// The CPU kernels for the compiler's default target: SSE2 on x86-64, NEON on aarch64.
#ifdef __SSE2__
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>

#define MOBILEMAMBA_CPU_ISA generic
#define MOBILEMAMBA_CPU_VECTOR_BYTES 16
#include "cpu/isa.h"
