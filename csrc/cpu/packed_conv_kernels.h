// CPU kernels of the convolution on a packed weight: a matrix product of patches and panels of the weight, and an
// epilogue on the sums while they are in registers or in L1.
#pragma once

#include "cpu/patches.h"
#include "cpu/vec.h"
#include "kernels/packed_conv.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// The most elements in the patches of a task: 256 KiB in float32, which stay in L2 while the weight streams through.
constexpr int64_t packed_conv_task_elements = 1 << 16;

/// Rows [first, last) of the output by one panel of the weight. All tasks have about the same number of rows, a
/// multiple of `step`: at least 48 if there are so many, because fewer do not pay for the pass over the weight.
template <int64_t step>
struct PackedConvTask {
  static_assert(packed_conv_task_rows % step == 0);
  int64_t first, last, channel;

  static int64_t rows(const PackedConvForward& p) {
    const int64_t most = min(packed_conv_task_rows, max(48, packed_conv_task_elements / max(1, p.patch())));
    return min(packed_conv_task_rows, ceil_div(ceil_div(p.rows(), ceil_div(p.rows(), most)), step) * step);
  }

  static int64_t count(const PackedConvForward& p) { return ceil_div(p.rows(), rows(p)) * p.panels(); }

  PackedConvTask(const PackedConvForward& p, int64_t index)
      : first(index / p.panels() * rows(p)),
        last(min(first + rows(p), p.rows())),
        channel(index % p.panels() * PackedConvForward::panel) {}

  int channels(const PackedConvForward& p) const {
    return static_cast<int>(min(PackedConvForward::panel, p.out_channels - channel));
  }
};

/// Prefetches the cache lines that the epilogue reads and writes. Rows are too far apart for the hardware's prefetcher.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void prefetch_row(const PackedConvForward& p, int64_t row, int64_t n) {
  __builtin_prefetch(static_cast<T*>(p.output) + row * p.output_row + n, 1);
  if (p.residual) __builtin_prefetch(static_cast<const T*>(p.residual) + row * p.residual_row + n);
  if (p.second_residual) __builtin_prefetch(static_cast<const T*>(p.second_residual) + row * p.second_residual_row + n);
}

/// Runs the epilogue on sums in registers and stores them: rows from `row` on, outputs from `n` on. The last vector of
/// a row has `count` outputs.
template <typename T, int rows, int vectors>
MOBILEMAMBA_HOST_DEVICE void finish(const PackedConvForward& p, Vec<float> (&sum)[rows][vectors], int64_t row,
                                    int64_t n, int count) {
  constexpr int size = Vec<float>::size;
  const auto each = [&](auto&& body) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        body(sum[r][v], row + r, n + v * size, v + 1 < vectors ? size : count);
  };
  const auto add = [&](const void* addend, int64_t addend_row) __attribute__((always_inline)) {
    each([=](Vec<float>& x, int64_t r, int64_t i, int length) __attribute__((always_inline)) {
      x = x + load(static_cast<const T*>(addend) + r * addend_row + i, length);
    });
  };
  if (p.bias)
    each([&](Vec<float>& x, int64_t, int64_t i, int length)
             __attribute__((always_inline)) { x = x + load(static_cast<const float*>(p.bias) + i, length); });
  if (p.residual && p.residual_inside) add(p.residual, p.residual_row);
  if (p.activation == Activation::relu)
    each([](Vec<float>& x, int64_t, int64_t, int) __attribute__((always_inline)) { x = max(x, Vec<float>(0.0f)); });
  if (p.residual && !p.residual_inside) add(p.residual, p.residual_row);
  if (p.second_residual) add(p.second_residual, p.second_residual_row);
  each([&](Vec<float>& x, int64_t r, int64_t i, int length)
           __attribute__((always_inline)) { store(static_cast<T*>(p.output) + r * p.output_row + i, x, length); });
}

/// The same for sums in memory, for `rows` rows by `vectors` vectors at a time: the fewer calls of finish(), the fewer
/// times it asks what the epilogue has.
template <typename T, int vectors, int rows, int64_t width>
MOBILEMAMBA_HOST_DEVICE void finish_block(const PackedConvForward& p, const float (*sums)[width], int64_t row,
                                          int64_t n, int count) {
  Vec<float> sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = load(sums[r] + v * Vec<float>::size, Vec<float>::size);
  finish<T>(p, sum, row, n, count);
}

/// The same for `rows` rows from `row` on, `channels` outputs from `channel` on.
template <typename T, int64_t width>
void finish_rows(const PackedConvForward& p, const float (*sums)[width], int64_t row, int64_t rows, int64_t channel,
                 int channels) {
  constexpr int size = Vec<float>::size, pair = 2 * size, most_rows = 4;
  for (int j = 0; j < channels; j += pair) {
    const int64_t n = channel + j;
    const int left = channels - j;
    for (int64_t r = 0; r < rows;) {
      const auto from = reinterpret_cast<const float (*)[width]>(sums[r] + j);
      int done = 1;
      if (left >= pair && rows - r >= most_rows)
        finish_block<T, 2, most_rows>(p, from, row + r, n, size), done = most_rows;
      else if (left >= pair)
        finish_block<T, 2, 1>(p, from, row + r, n, size);
      else if (left > size)
        finish_block<T, 2, 1>(p, from, row + r, n, left - size);
      else if (left == size)
        finish_block<T, 1, 1>(p, from, row + r, n, size);
      else
        finish_block<T, 1, 1>(p, from, row + r, n, left);
      r += done;
    }
  }
}

/// The elements of even and of odd index in a followed by b.
MOBILEMAMBA_HOST_DEVICE void split_pairs(Vec<float> a, Vec<float> b, Vec<float>& even, Vec<float>& odd) {
#if MOBILEMAMBA_CPU_VECTOR_BYTES == 64
  even = shuffle<0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30>(a, b);
  odd = shuffle<1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31>(a, b);
#elif MOBILEMAMBA_CPU_VECTOR_BYTES == 32  // two steps, because each is one instruction
  const auto first = shuffle<0, 2, 8, 10, 4, 6, 12, 14>(a, b), second = shuffle<1, 3, 9, 11, 5, 7, 13, 15>(a, b);
  even = shuffle<0, 1, 4, 5, 2, 3, 6, 7>(first, first);
  odd = shuffle<0, 1, 4, 5, 2, 3, 6, 7>(second, second);
#else
  even = shuffle<0, 2, 4, 6>(a, b);
  odd = shuffle<1, 3, 5, 7>(a, b);
#endif
}

/// Products in float32. A panel is unpacked to float32 in blocks of inputs. The part of a block that one pass reads
/// fits in L1, and all rows of the task use a block before the next one is unpacked.
template <typename T>
struct PackedConvKernel {
  static_assert(sizeof(T) <= 4);
  using V = Vec<float>;
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int most_vectors = 2, step = most_vectors * V::size;  // outputs of a pass
  /// Rows of a pass. With `most_vectors` their sums fill 24 of the 32 registers of AVX-512, and 12 of 16 elsewhere. On
  /// aarch64 they fill 16 of 32: GCC loads the inputs of all rows before it uses them, so these need registers too.
#ifdef __aarch64__
  static constexpr int most_rows = 8;
#else
  static constexpr int most_rows = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 12 : 6;
#endif
  /// Inputs of a block: `step` outputs of it take 24 KiB with AVX-512, 20 with AVX2, 10 elsewhere, in an L1 of 32 or
  /// more.
  static constexpr int64_t most_inputs = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 192 : 320;
  using Task = PackedConvTask<most_rows>;

  struct alignas(64) Scratch {
    float weight[panel / step][most_inputs + 2][step];      // whole pairs: at most one more input at either end
    float sums[panel / step][packed_conv_task_rows][step];  // over the blocks so far
  };

  static size_t scratch_bytes(const PackedConvForward& p) { return sizeof(Scratch) + PatchParts<T>::scratch_bytes(p); }

  /// A part longer than a block is split into pieces of about equal length. A block takes several short parts.
  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* memory) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
    PatchParts<T> patches;
    const int64_t parts = patches.count(p), length = patches.inputs(p);
    const int64_t pieces = max(1, ceil_div(length, most_inputs)), piece = max(1, ceil_div(length, pieces));
    const int64_t together = pieces > 1 ? 1 : min(parts, most_inputs / max(1, length));
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      patches.set(p, task.first, task.last, memory + sizeof(Scratch));
      for (int64_t part = 0; part < parts; part += together)
        for (int64_t i = 0; i == 0 || i < length; i += piece)  // once if there are no inputs
          run_block(p, patches, task, {part, min(together, parts - part), i, min(piece, length - i), length}, scratch);
    }
  }

 private:
  /// `inputs` inputs, from `offset` on, of each of `parts` parts of a patch. A part has `length` inputs.
  struct Block {
    int64_t part, parts, offset, inputs, length;
    int64_t begin() const { return part * length + offset; }
    int64_t end() const { return begin() + (parts - 1) * length + inputs; }
  };

  /// Rows by vectors of outputs whose sums fit in the registers, over one block of inputs.
  struct Tile {
    const PackedConvForward& p;
    const Block& block;
    int64_t row, n;
    const float* const* input;  // pointers to the block's first part, from `row` on
    const float* weight;
    const T* ahead;  // address to prefetch, which advances by ahead_step elements for each input
    int64_t ahead_step;
    float (*sums)[step];
    bool finish;  // whether the epilogue follows: after the last inputs, for whole vectors
  };

  static void run_block(const PackedConvForward& p, const PatchParts<T>& patches, const Task& task, const Block& block,
                        Scratch& scratch) {
    const int channels = task.channels(p);
    const bool last = block.end() == p.patch();
    // each pass over the block prefetches its share of the next block, so that memory is busy all the time
    const T* ahead = unpack(p, task.channel, block, scratch);
    const int64_t tiles = ceil_div(channels, step) * ceil_div(task.last - task.first, most_rows);
    const int64_t ahead_step = ceil_div(panel, tiles);
    for (int64_t j = 0; j < channels; j += step) {
      const int count = static_cast<int>(min(step, channels - j));
      for (int64_t row = task.first; row < task.last;) {
        const int64_t left = task.last - row, rows = ceil_div(left, ceil_div(left, most_rows));  // equal passes
        const int64_t n = task.channel + j;
        float (*sums)[step] = scratch.sums[j / step] + (row - task.first);
        const Tile tile = {.p = p,
                           .block = block,
                           .row = row,
                           .n = n,
                           .input = patches.of(row, block.part),
                           .weight = scratch.weight[j / step][block.begin() % 2],
                           .ahead = ahead,
                           .ahead_step = ahead_step,
                           .sums = sums,
                           .finish = last && count % V::size == 0};
        if (last)
          for (int64_t r = 0; r < rows; ++r)
            prefetch_row<T>(p, row + r, n);
        if (count > V::size)
          multiply<most_vectors>(static_cast<int>(rows), tile);
        else
          multiply<1>(static_cast<int>(rows), tile);
        if (last && !tile.finish) finish_rows<T>(p, sums, row, rows, n, count);
        row += rows;
        ahead += ahead_step * (block.end() - block.begin());
      }
    }
  }

  /// Unpacks a block of the panel into the layout that a pass reads. Returns the end of the block in the panel.
  static const T* unpack(const PackedConvForward& p, int64_t channel, const Block& block, Scratch& scratch) {
    const int64_t first = block.begin() / 2, pairs = (block.end() + 1) / 2 - first;
    const T* weight = static_cast<const T*>(p.weight) + 2 * (channel * p.pairs() + first * panel);
    for (int64_t k = 0; k < pairs; ++k)  // the partner of an odd last input is zero
      for (int64_t j = 0; j < panel; j += V::size, weight += 2 * V::size) {
        V even, odd;
        split_pairs(load(weight, V::size), load(weight + V::size, V::size), even, odd);
        store(&scratch.weight[j / step][2 * k][j % step], even, V::size);
        store(&scratch.weight[j / step][2 * k + 1][j % step], odd, V::size);
      }
    return weight;
  }

  template <int vectors, int rows = most_rows>
  static void multiply(int count, const Tile& tile) {
    if constexpr (rows > 1)
      if (count < rows) return multiply<vectors, rows - 1>(count, tile);
    multiply_rows<vectors, rows>(tile);
  }

  // GCC keeps all sums in registers only if these loops are unrolled early, hence the pragmas, and if every index of a
  // sum is constant. One sum in memory halves the speed (benchmarks/NOTES.md).
  template <int vectors, int rows>
  __attribute__((noinline)) static void multiply_rows(const Tile& tile) {
    V sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = tile.block.begin() > 0 ? load(tile.sums[r] + v * V::size, V::size) : V(0.0f);
    const float* weight = tile.weight;
    const T* ahead = tile.ahead;
    const int64_t inputs = tile.block.inputs, ahead_step = tile.ahead_step;
    for (int64_t part = 0; part < tile.block.parts; ++part) {
      const float* input[rows];
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
        input[r] = tile.input[part * packed_conv_task_rows + r] + tile.block.offset;
      for (int64_t k = 0; k < inputs; ++k, weight += step, ahead += ahead_step) {
        __builtin_prefetch(ahead, 0, 2);  // into L2: in L1 it would evict the present block
        V w[vectors];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v)
          w[v] = load(weight + v * V::size, V::size);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const V x(input[r][k]);
#pragma GCC unroll 16
          for (int v = 0; v < vectors; ++v)
            sum[r][v] = sum[r][v] + x * w[v];
        }
      }
    }
    if (tile.finish) {
      finish<T>(tile.p, sum, tile.row, tile.n, V::size);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v)
          store(tile.sums[r] + v * V::size, sum[r][v], V::size);
    }
  }
};

/// The kernel's functions for every element type except float64.
inline size_t packed_conv_scratch_bytes(const PackedConvForward& p) {
  return p.dtype == DType::float32 ? PackedConvKernel<float>::scratch_bytes(p)
                                   : PackedConvKernel<Half>::scratch_bytes(p);
}
inline void run_packed_conv(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* scratch) {
  switch (p.dtype) {
    case DType::float32:
      return PackedConvKernel<float>::run(p, begin, end, scratch);
    case DType::float16:
      return PackedConvKernel<Half>::run(p, begin, end, scratch);
    case DType::bfloat16:
      return PackedConvKernel<BFloat16>::run(p, begin, end, scratch);
    case DType::float64:
      __builtin_unreachable();  // with_torch() serves it
  }
}

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
