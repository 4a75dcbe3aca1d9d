// The pointwise convolution in bfloat16, for AVX-512 with sums of products of bfloat16 pairs.
#ifdef __x86_64__
// system headers first, so that nothing in them is compiled for more than every machine has
#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#define MOBILEMAMBA_CPU_ISA avx512bf16
#define MOBILEMAMBA_CPU_VECTOR_BYTES 64
#include "cpu/kernels.h"
#include "cpu/pointwise_kernels.h"

namespace mobilemamba::cpu::avx512bf16 {
namespace {

/// A lane adds the products of an output's two inputs; a panel's 32 outputs are two vectors.
struct PairKernel {
  static constexpr int64_t panel = PointwiseForward::panel;
  static constexpr int vectors = 2, most_rows = 8;
  typedef int32_t Pairs __attribute__((vector_size(64)));
#ifdef __clang__
  typedef __bf16 Lanes __attribute__((vector_size(64)));
  static constexpr auto dot = [](auto sum, Lanes a, Lanes b) { return __builtin_ia32_dpbf16ps_512(sum, a, b); };
#else
  typedef short Lanes __attribute__((vector_size(64)));
  static constexpr auto dot = [](auto sum, Lanes a, Lanes b) { return __builtin_ia32_dpbf16ps_v16sf(sum, a, b); };
#endif

  static int64_t tasks(const PointwiseForward& p) { return ceil_div(p.rows, pointwise_task_rows) * p.panels(); }
  static size_t scratch_bytes(const PointwiseForward&) { return 0; }

  static void run(const PointwiseForward& p, int64_t begin, int64_t end, std::byte*) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / p.panels() * pointwise_task_rows, n = task % p.panels() * panel;
      const int64_t last = min(first + pointwise_task_rows, p.rows);
      const int count = static_cast<int>(min(panel, p.out_channels - n));
      int64_t row = first;
      for (; row + most_rows <= last; row += most_rows)
        tile<most_rows>(p, row, n, count);
      for (; row + 4 <= last; row += 4)
        tile<4>(p, row, n, count);
      for (; row < last; ++row)
        tile<1>(p, row, n, count);
    }
  }

  template <int rows>
  static void tile(const PointwiseForward& p, int64_t row, int64_t n, int count) {
    const BFloat16* input = static_cast<const BFloat16*>(p.input) + row * p.input_row;
    const BFloat16* weight = static_cast<const BFloat16*>(p.weight) + n * 2 * p.pairs();
    Vec<float>::Raw sum[rows][vectors] = {};
    const int64_t whole = p.in_channels / 2 * 2;
    for (int64_t k = 0; k < p.in_channels; k += 2) {
      Lanes w[vectors];
      __builtin_memcpy(w, weight + k * panel, sizeof w);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        int32_t pair = 0;
        if (k < whole)
          __builtin_memcpy(&pair, input + r * p.input_row + k, 4);
        else
          __builtin_memcpy(&pair, input + r * p.input_row + k, 2);
        const Lanes x = (Lanes)(Pairs{} + pair);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = dot(sum[r][v], x, w[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        if (v * 16 < count)
          finish_pointwise<BFloat16>(p, Vec<float>(sum[r][v]), row + r, n + v * 16,
                                     static_cast<int>(min(16, count - v * 16)));
  }
};

}  // namespace

constinit const Kernel<PointwiseForward> pointwise_bfloat16 = {PairKernel::tasks, PairKernel::scratch_bytes,
                                                               PairKernel::run};

}  // namespace mobilemamba::cpu::avx512bf16

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
