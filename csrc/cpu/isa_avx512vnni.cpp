// The convolution on a quantized weight, for AVX-512 with dot products of groups of four bytes.
#ifdef __x86_64__
// System headers come before the target pragma: the linker may keep their functions for every machine.
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif

#define MOBILEMAMBA_CPU_ISA avx512vnni
#define MOBILEMAMBA_CPU_VECTOR_BYTES 64
#include "cpu/kernels.h"
#include "cpu/quantized_conv_kernels.h"

namespace mobilemamba::cpu::avx512vnni {
namespace {

/// A lane adds the products of a group of inputs of one output. A panel's 32 outputs are two vectors.
struct GroupProducts {
  static constexpr int64_t group = PackedConvForward::group;
  static constexpr int vectors = 2, most_rows = 12;
  using Task = PackedConvTask<most_rows>;
  using Patches = QuantizedPatches<group>;
  using Sums = QuantizedSums<most_rows>;
  typedef int32_t Groups __attribute__((vector_size(64)));

  static size_t scratch_bytes(const PackedConvForward& p) { return sizeof(Sums) + Patches::scratch_bytes(p); }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    Sums& sums = *reinterpret_cast<Sums*>(scratch);
    Patches patches;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      const QuantizedPanel from(p, task.channel);
      patches.set(p, task.first, task.last, scratch + sizeof(Sums));
      // the first pass over the panel prefetches the next panel
      const int8_t* ahead = from.end();
      for (int64_t row = task.first; row < task.last; ahead = from.weight) {
        const int64_t left = task.last - row, rows = ceil_div(left, ceil_div(left, most_rows));  // equal passes
        for (int64_t r = 0; r < rows; ++r)
          prefetch_quantized_row(p, row + r, task.channel);
        multiply(static_cast<int>(rows), patches.data + (row - task.first) * patches.row, patches.row, from.weight,
                 ahead, p.groups(), sums);
        finish_quantized(p, from, sums, row, rows, task.channel, task.channels(p));
        row += rows;
      }
    }
  }

  template <int rows = most_rows>
  static void multiply(int count, const uint8_t* input, int64_t row, const int8_t* weight, const int8_t* ahead,
                       int64_t groups, Sums& sums) {
    if constexpr (rows > 1)
      if (count < rows) return multiply<rows - 1>(count, input, row, weight, ahead, groups, sums);
    multiply_rows<rows>(input, row, weight, ahead, groups, sums);
  }

  // As in packed_conv_kernels.h, every index of a sum is constant: with a copy of the whole array GCC stored each sum
  // after each product, and the kernel took twice the time.
  template <int rows>
  __attribute__((noinline)) static void multiply_rows(const uint8_t* input, int64_t row, const int8_t* weight,
                                                      const int8_t* ahead, int64_t groups, Sums& sums) {
    __m512i sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = _mm512_setzero_si512();
    for (int64_t g = 0; g < groups; ++g) {
      __m512i w[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        w[v] = _mm512_loadu_si512(weight + g * QuantizedPanel::row + v * 64);
        __builtin_prefetch(ahead + g * QuantizedPanel::row + v * 64);
      }
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        int32_t x;
        __builtin_memcpy(&x, input + r * row + g * group, sizeof x);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = _mm512_dpbusd_epi32(sum[r][v], (__m512i)(Groups{} + x), w[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        _mm512_storeu_si512(sums.values[r] + v * 16, sum[r][v]);
  }
};

}  // namespace

constinit const Kernel<PackedConvForward> packed_conv_int8 = quantized_conv<GroupProducts>;

}  // namespace mobilemamba::cpu::avx512vnni

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
