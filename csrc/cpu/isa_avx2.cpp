// The CPU kernels for AVX2.
#ifdef __x86_64__
// system headers first, so that nothing in them is compiled for more than every machine has
#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define MOBILEMAMBA_CPU_ISA avx2
#define MOBILEMAMBA_CPU_VECTOR_BYTES 32
#include "cpu/isa.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
