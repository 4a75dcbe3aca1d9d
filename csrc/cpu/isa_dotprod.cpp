// The convolution on a quantized weight, for aarch64 with dot products of groups of four bytes (ARMv8.2's dotprod).
#ifdef __aarch64__
// System headers come before the target pragma: the linker may keep their functions for every machine.
#include <arm_neon.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define MOBILEMAMBA_CPU_ISA dotprod
#define MOBILEMAMBA_CPU_VECTOR_BYTES 16
#include "cpu/kernels.h"
#include "cpu/quantized_conv_kernels.h"

namespace mobilemamba::cpu::dotprod {
namespace {

/// A lane adds the products of a group of inputs of one output. Both factors of the instruction are signed: inputs are
/// taken as x - 128, and the sums begin with what that leaves out, 128 times the sum of an output's weights.
struct SignedProducts {
  static constexpr int64_t group = PackedConvForward::group, panel = PackedConvForward::panel;
  static constexpr int lanes = 4, vectors = 2, most_rows = 8;  // 16 sums, 8 inputs and 2 weights in 32 registers
  using Task = PackedConvTask<most_rows>;
  using Patches = QuantizedPatches<group>;

  struct alignas(64) Scratch {
    QuantizedSums<most_rows> sums;
    int32_t offsets[panel];
  };

  static size_t scratch_bytes(const PackedConvForward& p) { return sizeof(Scratch) + Patches::scratch_bytes(p); }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* memory) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
    uint8_t* const inputs = reinterpret_cast<uint8_t*>(memory + sizeof(Scratch));
    Patches patches;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      const QuantizedPanel from(p, task.channel);
      if (patches.set(p, task.first, task.last, memory + sizeof(Scratch)))
        for (int64_t i = 0; i < (task.last - task.first) * patches.row; ++i)
          inputs[i] ^= 0x80;
      set_offsets(from.weight, p.groups(), scratch.offsets);
      for (int64_t row = task.first; row < task.last;) {
        const int64_t left = task.last - row, rows = ceil_div(left, ceil_div(left, most_rows));  // equal passes
        for (int64_t r = 0; r < rows; ++r)
          prefetch_quantized_row(p, row + r, task.channel);
        const uint8_t* input = inputs + (row - task.first) * patches.row;
        for (int64_t j = 0; j < panel; j += vectors * lanes)
          multiply(static_cast<int>(rows), input, patches.row, from.weight + j * group, p.groups(), scratch.offsets + j,
                   scratch.sums.values[0] + j);
        finish_quantized(p, from, scratch.sums, row, rows, task.channel, task.channels(p));
        row += rows;
      }
    }
  }

  /// Adds to each lane the products of its group of `weight` by the first group of `x`. This is vdotq_lane_s32, which
  /// clang before 16 declares only where dotprod is a flag of the whole file.
  MOBILEMAMBA_HOST_DEVICE static void add_products(int32x4_t& sum, int8x16_t weight, int8x8_t x) {
    asm("sdot %0.4s, %1.16b, %2.4b[0]" : "+w"(sum) : "w"(weight), "w"(x));
  }

  static void set_offsets(const int8_t* weight, int64_t groups, int32_t* offsets) {
    int32x4_t sum[panel / lanes] = {};
    for (int64_t g = 0; g < groups; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < panel / lanes; ++v, weight += 16)
        add_products(sum[v], vld1q_s8(weight), vdup_n_s8(1));
#pragma GCC unroll 8
    for (int v = 0; v < panel / lanes; ++v)
      vst1q_s32(offsets + v * lanes, vshlq_n_s32(sum[v], 7));
  }

  template <int rows = most_rows>
  static void multiply(int count, const uint8_t* input, int64_t row, const int8_t* weight, int64_t groups,
                       const int32_t* offsets, float* sums) {
    if constexpr (rows > 1)
      if (count < rows) return multiply<rows - 1>(count, input, row, weight, groups, offsets, sums);
    multiply_rows<rows>(input, row, weight, groups, offsets, sums);
  }

  // As in packed_conv_kernels.h, every index of a sum is constant.
  template <int rows>
  __attribute__((noinline)) static void multiply_rows(const uint8_t* input, int64_t row, const int8_t* weight,
                                                      int64_t groups, const int32_t* offsets, float* sums) {
    int32x4_t sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = vld1q_s32(offsets + v * lanes);
    for (int64_t g = 0; g < groups; ++g, weight += QuantizedPanel::row) {
      int8x16_t w[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        w[v] = vld1q_s8(weight + v * 16);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        int32_t x;
        __builtin_memcpy(&x, input + r * row + g * group, sizeof x);
        const int8x8_t group_of_row = vreinterpret_s8_s32(vset_lane_s32(x, vdup_n_s32(0), 0));
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          add_products(sum[r][v], w[v], group_of_row);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        vst1q_s32(reinterpret_cast<int32_t*>(sums + r * panel + v * lanes), sum[r][v]);
  }
};

}  // namespace

constinit const Kernel<PackedConvForward> packed_conv_int8 = quantized_conv<SignedProducts>;

}  // namespace mobilemamba::cpu::dotprod

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
