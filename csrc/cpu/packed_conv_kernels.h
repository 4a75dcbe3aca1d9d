// CPU kernels of the convolution on a packed weight: a matrix product of patches and panels of the weight, and an
// epilogue on its sums while they are in the first cache.
#pragma once

#include "cpu/vec.h"
#include "kernels/packed_conv.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// Most rows of a task, and most numbers in their patches, which stay in the second cache while the weight passes by.
constexpr int64_t packed_conv_task_rows = 192, packed_conv_task_numbers = 1 << 16;

/// A task: these rows of the output, one panel of the weight. All tasks have about as many rows, a multiple of `step`.
template <int64_t step>
struct PackedConvTask {
  static_assert(packed_conv_task_rows % step == 0);
  int64_t first, last, channel;

  static int64_t rows(const PackedConvForward& p) {
    const int64_t most = min(packed_conv_task_rows, max(48, packed_conv_task_numbers / max(1, p.patch())));
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

/// A copy in pieces whose size the compiler knows: patches are many and short, and a call for each takes longer. The
/// last piece may repeat bytes of the one before.
template <int64_t piece>
MOBILEMAMBA_HOST_DEVICE void copy_pieces(const char* from, char* to, int64_t bytes) {
  if (bytes >= piece) {
    for (int64_t i = 0; i + piece <= bytes; i += piece)
      __builtin_memcpy(to + i, from + i, piece);
    __builtin_memcpy(to + bytes - piece, from + bytes - piece, piece);
  } else if constexpr (piece > 2) {
    copy_pieces<piece / 2>(from, to, bytes);
  }
}

/// Copies whole and partial vectors of numbers, from one type to another.
template <typename From, typename To>
MOBILEMAMBA_HOST_DEVICE void copy_numbers(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + Vec<float>::size <= count; i += Vec<float>::size)
    store(to + i, load(from + i, Vec<float>::size), Vec<float>::size);
  if (i < count) {
    const int left = static_cast<int>(count - i);
    store(to + i, load(from + i, left), left);
  }
}
template <typename T>
MOBILEMAMBA_HOST_DEVICE void copy_numbers(const T* from, T* to, int64_t count) {
  copy_pieces<64>(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(to), count * sizeof(T));
}

/// The patches of a task's rows, one after another, in the type that the product takes. What is copied is filled up
/// with zeros to a multiple of `step` numbers; with `always_whole`, patches of other sizes are copied for that.
template <typename From, typename To, int64_t step, bool always_whole = false>
struct Patches {
  const To* data;
  int64_t row;  // elements from patch to patch
  int64_t gathered = -1;

  static bool in_place(const PackedConvForward& p) {
    return sizeof(From) == sizeof(To) && p.in_place() && (!always_whole || p.patch() % step == 0);
  }

  static int64_t whole(const PackedConvForward& p) { return ceil_div(p.patch(), step) * step; }

  static size_t scratch_bytes(const PackedConvForward& p) {
    return in_place(p) ? 0 : ceil_div(packed_conv_task_rows * whole(p) * sizeof(To), 64) * 64;
  }

  /// For the rows [first, last), with scratch memory that keeps what was gathered last.
  void set(const PackedConvForward& p, int64_t first, int64_t last, std::byte* scratch) {
    if (in_place(p)) {
      row = p.input.column;
      data = reinterpret_cast<const To*>(static_cast<const From*>(p.input.data) + first * row);
      return;
    }
    data = reinterpret_cast<const To*>(scratch);
    row = whole(p);
    if (gathered != first) gather(p, gathered = first, last, reinterpret_cast<To*>(scratch));
  }

 private:
  static void gather(const PackedConvForward& p, int64_t first, int64_t last, To* to) {
    const int64_t width = p.out_width(), pad = p.kernel / 2, channels = p.in_channels;
    int64_t x = first % width, y = first / width % p.out_height(), batch = first / width / p.out_height();
    for (int64_t i = first; i < last; ++i, to += whole(p)) {
      const From* image = static_cast<const From*>(p.input.data) + batch * p.input.batch;
      const int64_t column = x * p.stride - pad;
      const int64_t begin = max(0, -column), end = min(p.kernel, p.width - column);  // columns inside
      for (int64_t ky = 0; ky < p.kernel; ++ky) {
        const int64_t line = y * p.stride - pad + ky;
        To* part = to + ky * p.kernel * channels;
        if (line < 0 || line >= p.height) {
          clear(part, p.kernel * channels);
          continue;
        }
        const From* from = image + line * p.input.row + (column + begin) * p.input.column;
        clear(part, begin * channels);
        if (p.input.column == channels)
          copy_numbers(from, part + begin * channels, (end - begin) * channels);
        else
          for (int64_t kx = begin; kx < end; ++kx)
            copy_numbers(from + (kx - begin) * p.input.column, part + kx * channels, channels);
        clear(part + end * channels, (p.kernel - end) * channels);
      }
      clear(to + p.patch(), whole(p) - p.patch());
      if (++x == width) {
        x = 0;
        if (++y == p.out_height()) {
          y = 0;
          ++batch;
        }
      }
    }
  }

  static void clear(To* to, int64_t count) {
    if (count > 0) __builtin_memset(to, 0, count * sizeof(To));
  }
};

/// The lines that finish_row will read and write: rows are far apart, so the hardware sees no pattern in them.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void prefetch_row(const PackedConvForward& p, int64_t row, int64_t n) {
  __builtin_prefetch(static_cast<T*>(p.output) + row * p.output_row + n, 1);
  if (p.residual) __builtin_prefetch(static_cast<const T*>(p.residual) + row * p.residual_row + n);
  if (p.second_residual) __builtin_prefetch(static_cast<const T*>(p.second_residual) + row * p.second_residual_row + n);
}

/// The epilogue, and the store of `count` outputs of a row.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void finish_row(const PackedConvForward& p, Vec<float> sum, int64_t row, int64_t n, int count) {
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.residual_row + n : nullptr;
  sum = sum + load(static_cast<const float*>(p.bias) + n, count);
  if (residual && p.residual_inside) sum = sum + load(residual, count);
  if (p.activation == Activation::relu) sum = max(sum, Vec<float>(0.0f));
  if (residual && !p.residual_inside) sum = sum + load(residual, count);
  if (p.second_residual)
    sum = sum + load(static_cast<const T*>(p.second_residual) + row * p.second_residual_row + n, count);
  store(static_cast<T*>(p.output) + row * p.output_row + n, sum, count);
}

/// The same for `rows` rows of a panel's `channels` outputs, whose sums lie in memory.
template <typename T>
void finish_rows(const PackedConvForward& p, const float (*sums)[PackedConvForward::panel], int64_t row, int64_t rows,
                 int64_t channel, int channels) {
  int j = 0;
  for (; j + Vec<float>::size <= channels; j += Vec<float>::size)
    for (int64_t r = 0; r < rows; ++r)
      finish_row<T>(p, load(sums[r] + j, Vec<float>::size), row + r, channel + j, Vec<float>::size);
  if (j < channels)
    for (int64_t r = 0; r < rows; ++r)
      finish_row<T>(p, load(sums[r] + j, Vec<float>::size), row + r, channel + j, channels - j);
}

/// The numbers of even and of odd place in a and then b.
MOBILEMAMBA_HOST_DEVICE void split_pairs(Vec<float> a, Vec<float> b, Vec<float>& even, Vec<float>& odd) {
#if MOBILEMAMBA_CPU_VECTOR_BYTES == 64
#define MOBILEMAMBA_EVERY_SECOND(i) \
  i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18, i + 20, i + 22, i + 24, i + 26, i + 28, i + 30
  even.raw = __builtin_shufflevector(a.raw, b.raw, MOBILEMAMBA_EVERY_SECOND(0));
  odd.raw = __builtin_shufflevector(a.raw, b.raw, MOBILEMAMBA_EVERY_SECOND(1));
#undef MOBILEMAMBA_EVERY_SECOND
#elif MOBILEMAMBA_CPU_VECTOR_BYTES == 32  // in two steps, each of which is one instruction
  const auto first = __builtin_shufflevector(a.raw, b.raw, 0, 2, 8, 10, 4, 6, 12, 14);
  const auto second = __builtin_shufflevector(a.raw, b.raw, 1, 3, 9, 11, 5, 7, 13, 15);
  even.raw = __builtin_shufflevector(first, first, 0, 1, 4, 5, 2, 3, 6, 7);
  odd.raw = __builtin_shufflevector(second, second, 0, 1, 4, 5, 2, 3, 6, 7);
#else
  even.raw = __builtin_shufflevector(a.raw, b.raw, 0, 2, 4, 6);
  odd.raw = __builtin_shufflevector(a.raw, b.raw, 1, 3, 5, 7);
#endif
}

/// Products in the type of sums. A panel is taken in blocks of inputs that fit the first cache, where they lie input by
/// input whatever the element type; all rows of the task pass over one block before the next.
template <typename T>
struct PackedConvKernel {
  static_assert(sizeof(T) <= 4);
  using V = Vec<float>;
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int vectors = 2;  // of outputs at a time
  static constexpr int step = vectors * V::size;
  static constexpr int most_rows = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 12 : 6;  // as registers allow
  static constexpr int64_t most_inputs = 128;                                    // of a block
  using Task = PackedConvTask<most_rows>;
  using FloatPatches = Patches<T, float, 1>;

  struct alignas(64) Scratch {
    float block[most_inputs][panel];
    float sums[packed_conv_task_rows][panel];  // of the blocks so far
  };

  static size_t scratch_bytes(const PackedConvForward& p) { return sizeof(Scratch) + FloatPatches::scratch_bytes(p); }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* memory) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
    FloatPatches patches;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      patches.set(p, task.first, task.last, memory + sizeof(Scratch));
      const T* weight = static_cast<const T*>(p.weight) + task.channel * 2 * p.pairs();
      for (int64_t k = 0; k == 0 || k < p.patch(); k += most_inputs) {  // once where there are no inputs at all
        const int64_t inputs = min(most_inputs, p.patch() - k);
        // each pass over the block fetches its share of what comes next, so that memory is busy all the time
        const T* ahead = unpack(weight + k * panel, inputs, scratch);
        const int64_t share = most_inputs * panel / (ceil_div(task.last - task.first, most_rows) * (panel / step));
        for (int64_t row = task.first; row < task.last;) {
          const int64_t left = task.last - row, rows = ceil_div(left, ceil_div(left, most_rows));  // about as many each
          const float* input = patches.data + (row - task.first) * patches.row + k;
          float (*sums)[panel] = scratch.sums + (row - task.first);
          const bool last = k + inputs == p.patch();
          if (last)
            for (int64_t r = 0; r < rows; ++r)
              prefetch_row<T>(p, row + r, task.channel);
          for (int j = 0; j < task.channels(p); j += step, ahead += share)
            multiply(static_cast<int>(rows), {input, patches.row, scratch.block[0] + j, inputs, ahead,
                                              ceil_div(share, max(1, inputs)), k > 0, sums[0] + j});
          if (last) finish_rows<T>(p, sums, row, rows, task.channel, task.channels(p));
          row += rows;
        }
      }
    }
  }

 private:
  /// Puts a part of the panel's inputs into the block; returns what comes after it.
  static const T* unpack(const T* weight, int64_t inputs, Scratch& scratch) {
    for (int64_t k = 0; k < inputs; k += 2)  // an odd last one's partner is in the panel, as zeros
      for (int64_t j = 0; j < panel; j += V::size, weight += 2 * V::size) {
        V even, odd;
        split_pairs(load(weight, V::size), load(weight + V::size, V::size), even, odd);
        store(&scratch.block[k][j], even, V::size);
        store(&scratch.block[k + 1][j], odd, V::size);
      }
    return weight;
  }

  /// Some rows by `step` outputs, whose sums fit the registers, over the inputs of a block.
  struct Tile {
    const float* input;
    int64_t input_row;
    const float* weight;
    int64_t inputs;
    const T* ahead;  // what to fetch meanwhile, so many elements with each input
    int64_t ahead_step;
    bool resume;  // whether there are sums of earlier blocks
    float* sums;
  };

  template <int rows = most_rows>
  static void multiply(int count, const Tile& tile) {
    if constexpr (rows > 1)
      if (count < rows) return multiply<rows - 1>(count, tile);
    multiply_rows<rows>(tile);
  }

  // GCC keeps all sums in registers only where it unrolls early, as it is told to here, and where nothing in this
  // function indexes them by a variable; one sum in memory halves the speed.
  template <int rows>
  __attribute__((noinline)) static void multiply_rows(const Tile& tile) {
    V sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = tile.resume ? load(tile.sums + r * panel + v * V::size, V::size) : V(0.0f);
    const T* ahead = tile.ahead;
    const int64_t ahead_step = tile.ahead_step, row = tile.input_row;
    const float *input = tile.input, *weight = tile.weight;
    for (int64_t k = 0; k < tile.inputs; ++k, ++input, weight += panel, ahead += ahead_step) {
      __builtin_prefetch(ahead);
      V w[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        w[v] = load(weight + v * V::size, V::size);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const V x(input[r * row]);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = sum[r][v] + x * w[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        store(tile.sums + r * panel + v * V::size, sum[r][v], V::size);
  }
};

/// The kernel's functions for any element type but float64.
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
      __builtin_unreachable();  // torch's own
  }
}

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
