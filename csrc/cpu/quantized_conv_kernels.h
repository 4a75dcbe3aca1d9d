// CPU kernels of the convolution on a quantized weight: a matrix product of patches and weight in 8 bits, with exact
// int32 sums, and the epilogue of packed_conv_kernels.h. All instruction sets give the same bits.
#pragma once

#include "cpu/packed_conv_kernels.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// One panel of a quantized weight; kernels/packed_conv.h has the layout.
struct QuantizedPanel {
  static constexpr int64_t row = PackedConvForward::panel * PackedConvForward::word;  // bytes

  const int8_t* weight;
  const std::byte *multipliers, *corrections, *input;

  QuantizedPanel(const PackedConvForward& p, int64_t channel)
      : weight(static_cast<const int8_t*>(p.weight) +
               channel / PackedConvForward::panel * (p.groups() + PackedConvForward::quantized_facts) * row),
        multipliers(reinterpret_cast<const std::byte*>(weight) + p.groups() * row),
        corrections(multipliers + row),
        input(corrections + row) {}

  /// Where the next panel begins.
  const int8_t* end() const { return reinterpret_cast<const int8_t*>(input + row); }
};

/// The low bytes of the lanes. GCC takes a conversion of vectors apart into scalars.
MOBILEMAMBA_HOST_DEVICE void store_low_bytes(uint8_t* to, Vec<float>::RawInt lanes, int count) {
  typedef uint8_t Bytes __attribute__((vector_size(Vec<float>::size)));
#if MOBILEMAMBA_CPU_VECTOR_BYTES == 64
  const Bytes bytes = (Bytes)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)lanes);  // GCC 12 warns without a mask
#elif MOBILEMAMBA_CPU_VECTOR_BYTES == 32
  const __m256i low = (__m256i)(lanes & 0xff);
  const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  const Bytes bytes = (Bytes)_mm_cvtsi128_si64(_mm_packus_epi16(shorts, shorts));
#elif defined(__SSE2__)
  const __m128i shorts = _mm_packs_epi32((__m128i)(lanes & 0xff), (__m128i)(lanes & 0xff));
  const Bytes bytes = (Bytes)_mm_cvtsi128_si32(_mm_packus_epi16(shorts, shorts));
#elif defined(__aarch64__)
  const uint16x4_t shorts = vmovn_u32((uint32x4_t)lanes);
  const Bytes bytes = (Bytes)vget_lane_u32((uint32x2_t)vmovn_u16(vcombine_u16(shorts, shorts)), 0);
#else
  const Bytes bytes = __builtin_convertvector(lanes, Bytes);
#endif
  store_raw(to, bytes, count);
}

/// How a kernel's input is rounded to 8 bits.
struct Rounding {
  float inverse_scale, zero_point;

  explicit Rounding(const PackedConvForward& p) { __builtin_memcpy(this, QuantizedPanel(p, 0).input, sizeof *this); }

  /// The sum with 1.5 * 2^23 rounds to the nearest integer and has it in its low bits. The limits around it keep
  /// compilers from fusing the product and the sum. NaN becomes 0.
  template <typename T>
  MOBILEMAMBA_HOST_DEVICE void round(const T* from, uint8_t* to, int count) const {
    const Vec<float> low(-zero_point), high(255.0f - zero_point);
    const Vec<float> x = max(low, load(from, count) * inverse_scale);
    const Vec<float> sum = select(x < high, x, high) + (12582912.0f + zero_point);
    store_low_bytes(to, (Vec<float>::RawInt)sum.raw, count);
  }

  template <typename T>
  MOBILEMAMBA_HOST_DEVICE void operator()(const T* from, uint8_t* to, int64_t count) const {
    constexpr int size = Vec<float>::size;
    if (count < size) return round(from, to, static_cast<int>(count));
    for (int64_t i = 0; i + size <= count; i += size)
      round(from + i, to + i, size);
    if (count % size > 0) round(from + count - size, to + count - size, size);  // some once more
  }

  MOBILEMAMBA_HOST_DEVICE void zeros(uint8_t* to, int64_t count) const {
    if (count > 0) __builtin_memset(to, static_cast<uint8_t>(zero_point), count);
  }
};

/// The patches of a task's rows in 8 bits, one after another, each padded to a multiple of `step` bytes. The padding
/// has any value: the weight is zero there.
template <int64_t step>
struct QuantizedPatches {
  const uint8_t* data = nullptr;
  int64_t row = 0;  // bytes from patch to patch
  int64_t first = -1;

  static int64_t whole(const PackedConvForward& p) { return ceil_div(p.patch(), step) * step; }
  static size_t scratch_bytes(const PackedConvForward& p) {
    return ceil_div(packed_conv_task_rows * whole(p), 64) * 64;
  }

  /// Prepares rows [begin, end). Scratch memory must keep the contents of the last call, which are used again. Returns
  /// whether they changed.
  bool set(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    if (first == begin) return false;
    first = begin;
    row = whole(p);
    uint8_t* to = reinterpret_cast<uint8_t*>(scratch);
    data = to;
    switch (p.dtype) {
      case DType::float32:
        fill<float>(p, begin, end, to);
        break;
      case DType::float16:
        fill<Half>(p, begin, end, to);
        break;
      case DType::bfloat16:
        fill<BFloat16>(p, begin, end, to);
        break;
      case DType::float64:
        __builtin_unreachable();  // the operators refuse it
    }
    return true;
  }

 private:
  template <typename T>
  static void fill(const PackedConvForward& p, int64_t begin, int64_t end, uint8_t* to) {
    const Rounding rounding(p);
    if (!p.in_place()) return copy_patches<T>(p, begin, end, to, whole(p), rounding);
    const T* from = static_cast<const T*>(p.input.data);
    for (int64_t i = begin; i < end; ++i, to += whole(p))
      rounding(from + i * p.input.column, to, p.in_channels);
  }
};

/// int32 sums of a tile, and in their place what they stand for in float32.
template <int rows>
struct alignas(64) QuantizedSums {
  float values[rows][PackedConvForward::panel];
};

/// Runs the epilogue on the int32 sums of `rows` rows from `row` on.
template <int most_rows>
void finish_quantized(const PackedConvForward& p, const QuantizedPanel& panel, QuantizedSums<most_rows>& sums,
                      int64_t row, int64_t rows, int64_t channel, int channels) {
  using V = Vec<float>;
  for (int j = 0; j < PackedConvForward::panel; j += V::size) {
    typename V::RawInt correction;
    V multiplier;
    __builtin_memcpy(&correction, panel.corrections + j * sizeof(float), sizeof correction);
    __builtin_memcpy(&multiplier, panel.multipliers + j * sizeof(float), sizeof multiplier);
    for (int64_t r = 0; r < rows; ++r) {
      typename V::RawInt sum;
      __builtin_memcpy(&sum, sums.values[r] + j, sizeof sum);
      const V value = V(__builtin_convertvector(sum - correction, V::Raw)) * multiplier;
      store(sums.values[r] + j, value, V::size);
    }
  }
  keep_loaded();  // through memory: a product that is fused with the sum after it would have other bits
  switch (p.dtype) {
    case DType::float32:
      return finish_rows<float>(p, sums.values, row, rows, channel, channels);
    case DType::float16:
      return finish_rows<Half>(p, sums.values, row, rows, channel, channels);
    case DType::bfloat16:
      return finish_rows<BFloat16>(p, sums.values, row, rows, channel, channels);
    case DType::float64:
      __builtin_unreachable();  // the operators refuse it
  }
}

MOBILEMAMBA_HOST_DEVICE void prefetch_quantized_row(const PackedConvForward& p, int64_t row, int64_t n) {
  if (p.dtype == DType::float32)
    prefetch_row<float>(p, row, n);
  else
    prefetch_row<BFloat16>(p, row, n);
}

/// The kernel, for the products of an instruction set: `Products` has Task, scratch_bytes(p) and run(p, begin, end,
/// scratch).
template <typename Products>
inline constexpr Kernel<PackedConvForward> quantized_conv = {Products::Task::count, Products::scratch_bytes,
                                                             Products::run};

/// Products of pairs in 16 bits, which every instruction set has: the bytes of a group are widened and taken apart into
/// its even and its odd elements. Instructions for 8-bit pairs without int32 sums would saturate.
struct PairProducts {
  using Int = Vec<float>::RawInt;
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int lanes = Vec<float>::size, vectors = 2, most_rows = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 12 : 6;
  using Task = PackedConvTask<most_rows>;
  using Patches = QuantizedPatches<PackedConvForward::group>;

  /// After the patches and their pairs: the panel's pairs, int32 [2 * groups][panel], and the sums.
  static size_t pairs_bytes(const PackedConvForward& p) {
    return ceil_div(packed_conv_task_rows * p.groups() * 2 * sizeof(int32_t), 64) * 64;
  }
  static size_t scratch_bytes(const PackedConvForward& p) {
    return Patches::scratch_bytes(p) + pairs_bytes(p) + p.groups() * 2 * panel * sizeof(int32_t) +
           sizeof(QuantizedSums<most_rows>);
  }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    Patches patches;
    std::byte* const rest = scratch + Patches::scratch_bytes(p);
    int32_t* const inputs = reinterpret_cast<int32_t*>(rest);
    int32_t* const weights = reinterpret_cast<int32_t*>(rest + pairs_bytes(p));
    auto& sums = *reinterpret_cast<QuantizedSums<most_rows>*>(weights + p.groups() * 2 * panel);
    const int64_t row_pairs = p.groups() * 2;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      const QuantizedPanel from(p, task.channel);
      if (patches.set(p, task.first, task.last, scratch))
        for (int64_t i = 0; i < (task.last - task.first) * p.groups(); ++i) {
          uint32_t group;
          __builtin_memcpy(&group, patches.data + 4 * i, 4);
          inputs[2 * i] = static_cast<int32_t>(group & 0x00ff00ff);
          inputs[2 * i + 1] = static_cast<int32_t>(group >> 8 & 0x00ff00ff);
        }
      unpack(from.weight, p.groups(), weights);
      for (int64_t row = task.first; row < task.last;) {
        const int64_t left = task.last - row, rows = ceil_div(left, ceil_div(left, most_rows));  // equal passes
        for (int64_t r = 0; r < rows; ++r)
          prefetch_quantized_row(p, row + r, task.channel);
        const int32_t* input = inputs + (row - task.first) * row_pairs;
        for (int64_t j = 0; j < panel; j += vectors * lanes)
          multiply(static_cast<int>(rows), input, row_pairs, weights + j, sums.values[0] + j);
        finish_quantized(p, from, sums, row, rows, task.channel, task.channels(p));
        row += rows;
      }
    }
  }

 private:
  typedef int16_t Shorts __attribute__((vector_size(MOBILEMAMBA_CPU_VECTOR_BYTES)));

  static void unpack(const int8_t* from, int64_t groups, int32_t* to) {
    for (int64_t g = 0; g < groups; ++g, to += 2 * panel)
      for (int64_t j = 0; j < panel; j += lanes, from += sizeof(Int)) {
        Shorts bytes;
        __builtin_memcpy(&bytes, from, sizeof bytes);
        const Shorts even = (bytes << 8) >> 8, odd = bytes >> 8;
        __builtin_memcpy(to + j, &even, sizeof even);
        __builtin_memcpy(to + panel + j, &odd, sizeof odd);
      }
  }

  /// sum + x.even * w.even + x.odd * w.odd, for the int16 halves of x and of each lane of w.
  MOBILEMAMBA_HOST_DEVICE static Int add_products(Int sum, int32_t x, Int w) {
#if MOBILEMAMBA_CPU_VECTOR_BYTES == 64
    return sum + (Int)_mm512_madd_epi16((__m512i)(Int{} + x), (__m512i)w);
#elif MOBILEMAMBA_CPU_VECTOR_BYTES == 32
    return sum + (Int)_mm256_madd_epi16((__m256i)(Int{} + x), (__m256i)w);
#elif defined(__SSE2__)
    return sum + (Int)_mm_madd_epi16((__m128i)(Int{} + x), (__m128i)w);
#elif defined(__aarch64__)
    const int16x4_t pair = (int16x4_t)vset_lane_s32(x, int32x2_t{}, 0);
    const int32x4_t even = vmlal_lane_s16((int32x4_t)sum, vmovn_s32((int32x4_t)w), pair, 0);
    return (Int)vmlal_lane_s16(even, vshrn_n_s32((int32x4_t)w, 16), pair, 1);
#else
    return sum + (int16_t)x * ((w << 16) >> 16) + (x >> 16) * (w >> 16);
#endif
  }

  template <int rows = most_rows>
  static void multiply(int count, const int32_t* input, int64_t row_pairs, const int32_t* weight, float* sums) {
    if constexpr (rows > 1)
      if (count < rows) return multiply<rows - 1>(count, input, row_pairs, weight, sums);
    multiply_rows<rows>(input, row_pairs, weight, sums);
  }

  template <int rows>
  __attribute__((noinline)) static void multiply_rows(const int32_t* input, int64_t row_pairs, const int32_t* weight,
                                                      float* sums) {
    Int sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = Int{};
    for (int64_t k = 0; k < row_pairs; ++k, weight += panel) {
      Int w[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        __builtin_memcpy(&w[v], weight + v * lanes, sizeof(Int));
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const int32_t x = input[r * row_pairs + k];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = add_products(sum[r][v], x, w[v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        __builtin_memcpy(sums + r * panel + v * lanes, &sum[r][v], sizeof(Int));
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
