// The convolution on a packed weight in bfloat16, for AVX-512 with dot products of bfloat16 pairs.
#ifdef __x86_64__
// System headers come before the target pragma: the linker may keep their functions for every machine.
#include <immintrin.h>

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
#define MOBILEMAMBA_CPU_ROUNDS_TO_BFLOAT16
#include "cpu/kernels.h"
#include "cpu/packed_conv_kernels.h"

namespace mobilemamba::cpu::avx512bf16 {
namespace {

/// A lane adds the products of a pair of inputs of one output. A panel's 32 outputs are two vectors.
struct PairKernel {
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int vectors = 2, most_rows = 8;
  using Task = PackedConvTask<most_rows>;
  typedef int32_t Pairs __attribute__((vector_size(64)));

  static size_t scratch_bytes(const PackedConvForward& p) { return Patches<BFloat16, 2>::scratch_bytes(p); }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    Patches<BFloat16, 2> patches;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      patches.set(p, task.first, task.last, scratch);
      const auto input = [&](int64_t row) { return patches.data + (row - task.first) * patches.row; };
      int64_t row = task.first;
      for (; row + most_rows <= task.last; row += most_rows)
        tile<most_rows>(p, input(row), patches.row, row, task);
      for (; row + 4 <= task.last; row += 4)
        tile<4>(p, input(row), patches.row, row, task);
      for (; row < task.last; ++row)
        tile<1>(p, input(row), patches.row, row, task);
    }
  }

  template <int rows>
  static void tile(const PackedConvForward& p, const BFloat16* input, int64_t input_row, int64_t row,
                   const Task& task) {
    const BFloat16* weight = static_cast<const BFloat16*>(p.weight) + task.channel * 2 * p.pairs();
    __m512 sum[rows][vectors] = {};
    for (int r = 0; r < rows; ++r)
      prefetch_row<BFloat16>(p, row + r, task.channel);
    const int64_t whole = p.patch() / 2 * 2;
    for (int64_t k = 0; k < p.patch(); k += 2) {
      __m512bh w[vectors];
      __builtin_memcpy(w, weight + k * panel, sizeof w);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        int32_t pair = 0;
        if (k < whole)
          __builtin_memcpy(&pair, input + r * input_row + k, 4);
        else
          __builtin_memcpy(&pair, input + r * input_row + k, 2);
        const __m512bh x = (__m512bh)(Pairs{} + pair);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, w[v]);
      }
    }
    float sums[rows][panel];
    __builtin_memcpy(sums, sum, sizeof sums);
    finish_rows<BFloat16>(p, sums, row, rows, task.channel, task.channels(p));
  }
};

}  // namespace

constinit const Kernel<PackedConvForward> packed_conv_bfloat16 = {PairKernel::Task::count, PairKernel::scratch_bytes,
                                                                  PairKernel::run};

}  // namespace mobilemamba::cpu::avx512bf16

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
