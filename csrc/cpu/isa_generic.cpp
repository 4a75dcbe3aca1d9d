// The CPU kernels for the compiler's default target.
#include <cmath>
#include <cstddef>
#include <cstdint>

#define MOBILEMAMBA_CPU_ISA generic
#define MOBILEMAMBA_CPU_VECTOR_BYTES 16
#include "cpu/isa.h"
