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
  static constexpr int vectors = 2, most_rows = 12;
  using Task = PackedConvTask<most_rows>;
  typedef int32_t Pairs __attribute__((vector_size(64)));

  struct alignas(64) Scratch {
    float sums[most_rows][panel];
  };

  static size_t scratch_bytes(const PackedConvForward& p) {
    return sizeof(Scratch) + Patches<BFloat16, 2>::scratch_bytes(p);
  }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* memory) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
    Patches<BFloat16, 2> patches;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      patches.set(p, task.first, task.last, memory + sizeof(Scratch));
      const BFloat16* weight = static_cast<const BFloat16*>(p.weight) + task.channel * 2 * p.pairs();
      for (int64_t row = task.first; row < task.last;) {
        const int64_t left = task.last - row, rows = ceil_div(left, ceil_div(left, most_rows));  // equal passes
        for (int64_t r = 0; r < rows; ++r)
          prefetch_row<BFloat16>(p, row + r, task.channel);
        const BFloat16* input = patches.data + (row - task.first) * patches.row;
        multiply(static_cast<int>(rows), input, patches.row, weight, p.patch(), scratch);
        finish_rows<BFloat16>(p, scratch.sums, row, rows, task.channel, task.channels(p));
        row += rows;
      }
    }
  }

  template <int rows = most_rows>
  static void multiply(int count, const BFloat16* input, int64_t row, const BFloat16* weight, int64_t inputs,
                       Scratch& scratch) {
    if constexpr (rows > 1)
      if (count < rows) return multiply<rows - 1>(count, input, row, weight, inputs, scratch);
    multiply_rows<rows>(input, row, weight, inputs, scratch);
  }

  template <int bytes>
  MOBILEMAMBA_HOST_DEVICE static int32_t load_pair(const BFloat16* from) {
    int32_t pair = 0;
    __builtin_memcpy(&pair, from, bytes);
    return pair;
  }

  // As in packed_conv_kernels.h, every index of a sum is constant: with a copy of the whole array GCC stored each sum
  // after each product, and the kernel took more than twice the time.
  template <int rows>
  __attribute__((noinline)) static void multiply_rows(const BFloat16* input, int64_t row, const BFloat16* weight,
                                                      int64_t inputs, Scratch& scratch) {
    __m512 sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = _mm512_setzero_ps();
    const auto add = [&](int64_t k, auto load) __attribute__((always_inline)) {
      __m512bh w[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        w[v] = (__m512bh)_mm512_loadu_si512(weight + k * panel + v * panel);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const __m512bh x = (__m512bh)(Pairs{} + load(input + r * row + k));
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, w[v]);
      }
    };
    int64_t k = 0;
    for (; k + 2 <= inputs; k += 2)
      add(k, [](const BFloat16* from) __attribute__((always_inline)) { return load_pair<4>(from); });
    if (k < inputs)  // an odd last input has no partner
      add(k, [](const BFloat16* from) __attribute__((always_inline)) { return load_pair<2>(from); });
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        _mm512_storeu_ps(scratch.sums[r] + v * 16, sum[r][v]);
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
