// The CPU kernels for AVX2.
#ifdef __x86_64__
// System headers come before the target pragma: the linker may keep their functions for every machine.
#include <immintrin.h>

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
