// The CPU kernels for AVX-512.
#ifdef __x86_64__
// System headers come before the target pragma: the linker may keep their functions for every machine.
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define MOBILEMAMBA_CPU_ISA avx512
#define MOBILEMAMBA_CPU_VECTOR_BYTES 64
#include "cpu/isa.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
