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

/// The epilogue on sums in registers, for rows from `row` and outputs from `n`, and their store. The last vector of a
/// row has `count` outputs.
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

/// The same for `rows` rows of `channels` outputs from `channel` on, whose sums lie in memory.
template <typename T, int64_t width>
void finish_rows(const PackedConvForward& p, const float (*sums)[width], int64_t row, int64_t rows, int64_t channel,
                 int channels) {
  for (int j = 0; j < channels; j += Vec<float>::size)
    for (int64_t r = 0; r < rows; ++r) {
      Vec<float> sum[1][1] = {{load(sums[r] + j, Vec<float>::size)}};
      if (j + Vec<float>::size <= channels)
        finish<T>(p, sum, row + r, channel + j, Vec<float>::size);
      else
        finish<T>(p, sum, row + r, channel + j, channels - j);
    }
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

/// The patches of a task's rows as pointers to their parts, for a kernel that can follow them. A part is what lies
/// together in the input: a line of the patch, or all of it where it has one line. Parts are read where they are, but
/// for those that reach over the border or are of another type: these are copied.
template <typename T>
class PatchParts {
 public:
  static int64_t count(const PackedConvForward& p) { return p.in_place() ? 1 : p.kernel; }
  static int64_t inputs(const PackedConvForward& p) { return p.patch() / count(p); }

  static size_t scratch_bytes(const PackedConvForward& p) {
    const size_t copies = lies(p) && p.in_place() ? 0 : (packed_conv_task_rows * p.patch() + inputs(p)) * sizeof(float);
    return (count(p) * packed_conv_task_rows * sizeof(float*) + copies + 63) / 64 * 64;
  }

  /// For the rows [first, last), with scratch memory that keeps what it was set to last.
  void set(const PackedConvForward& p, int64_t first, int64_t last, std::byte* scratch) {
    if (first == first_) return;
    first_ = first;
    parts_ = reinterpret_cast<const float**>(scratch);
    float* copies = reinterpret_cast<float*>(scratch + count(p) * packed_conv_task_rows * sizeof(float*));
    if (p.in_place())
      set_rows(p, last - first, copies);
    else
      set_lines(p, last - first, copies);
  }

  /// To a part of the patch of a row, and of those that follow.
  const float* const* of(int64_t row, int64_t part) const {
    return parts_ + part * packed_conv_task_rows + row - first_;
  }

 private:
  /// Whether parts can be read where they are.
  static bool lies(const PackedConvForward& p) {
    return sizeof(T) == sizeof(float) && (p.in_place() || p.input.column == p.in_channels);
  }

  void set_rows(const PackedConvForward& p, int64_t rows, float* copies) {
    const T* from = static_cast<const T*>(p.input.data) + first_ * p.input.column;
    for (int64_t r = 0; r < rows; ++r, from += p.input.column) {
      if constexpr (sizeof(T) == sizeof(float)) {
        parts_[r] = from;
      } else {
        copy_numbers(from, copies, p.in_channels);
        parts_[r] = copies;
        copies += p.in_channels;
      }
    }
  }

  void set_lines(const PackedConvForward& p, int64_t rows, float* copies) {
    const int64_t width = p.out_width(), pad = p.kernel / 2, length = inputs(p);
    const float* zeros = copies;
    clear(copies, length);
    copies += length;
    // columns of the output whose patches lie within the image from side to side
    const int64_t inner = lies(p) ? ceil_div(pad, p.stride) : width;
    const int64_t inner_end = max(inner, (p.width - p.kernel + pad) / p.stride + 1);
    for (int64_t r = 0; r < rows;) {  // a line of the output, or as much of it as the task has
      const int64_t line = (first_ + r) / width, begin = (first_ + r) % width, end = min(width, begin + rows - r);
      const T* image = static_cast<const T*>(p.input.data) + line / p.out_height() * p.input.batch;
      for (int64_t part = 0; part < p.kernel; ++part) {
        const float** to = parts_ + part * packed_conv_task_rows + r - begin;
        const int64_t y = line % p.out_height() * p.stride - pad + part;
        if (y < 0 || y >= p.height) {
          for (int64_t x = begin; x < end; ++x)
            to[x] = zeros;
          continue;
        }
        const T* from = image + y * p.input.row - pad * p.input.column;
        for (int64_t x = begin; x < end;) {
          if constexpr (sizeof(T) == sizeof(float))
            for (; x >= inner && x < min(end, inner_end); ++x)
              to[x] = from + x * p.stride * p.input.column;
          if (x == end) break;
          copy_line(p, x * p.stride - pad, from + x * p.stride * p.input.column, copies);
          to[x++] = copies;
          copies += length;
        }
      }
      r += end - begin;
    }
  }

  /// A line of a patch from the image's column `column` on, part of which may be outside.
  static void copy_line(const PackedConvForward& p, int64_t column, const T* from, float* to) {
    const int64_t channels = p.in_channels, begin = max(0, -column), end = min(p.kernel, p.width - column);
    clear(to, begin * channels);
    if (p.input.column == channels)
      copy_numbers(from + begin * channels, to + begin * channels, (end - begin) * channels);
    else
      for (int64_t kx = begin; kx < end; ++kx)
        copy_numbers(from + kx * p.input.column, to + kx * channels, channels);
    clear(to + end * channels, (p.kernel - end) * channels);
  }

  static void clear(float* to, int64_t count) {
    if (count > 0) __builtin_memset(to, 0, count * sizeof(float));
  }

  const float** parts_ = nullptr;
  int64_t first_ = -1;
};

/// Products in the type of sums. A panel is unpacked in blocks of inputs, of which as many outputs as one pass takes
/// fit the first cache; all rows of the task pass over one block before the next.
template <typename T>
struct PackedConvKernel {
  static_assert(sizeof(T) <= 4);
  using V = Vec<float>;
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int most_vectors = 2, step = most_vectors * V::size;                   // of outputs in a pass
  static constexpr int most_rows = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 12 : 6;           // as registers allow
  static constexpr int64_t most_inputs = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 192 : 320;  // of a block
  using Task = PackedConvTask<most_rows>;

  struct alignas(64) Scratch {
    float weight[panel / step][most_inputs + 2][step];      // from pair to pair: with an input too many on either side
    float sums[panel / step][packed_conv_task_rows][step];  // of the blocks so far
  };

  static size_t scratch_bytes(const PackedConvForward& p) { return sizeof(Scratch) + PatchParts<T>::scratch_bytes(p); }

  /// A part that is too long for a block is taken in pieces of about equal length; of short ones a block takes several.
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
        for (int64_t i = 0; i == 0 || i < length; i += piece)  // once where there are no inputs at all
          run_block(p, patches, task, {part, min(together, parts - part), i, min(piece, length - i), length}, scratch);
    }
  }

 private:
  /// Of `parts` parts of a patch, each of which has `length` inputs, the `inputs` from `offset` on.
  struct Block {
    int64_t part, parts, offset, inputs, length;
    int64_t begin() const { return part * length + offset; }
    int64_t end() const { return begin() + (parts - 1) * length + inputs; }
  };

  /// Some rows by some vectors of outputs, whose sums fit the registers, over a block.
  struct Tile {
    const PackedConvForward& p;
    const Block& block;
    int64_t row, n;
    const float* const* input;  // the block's first part, for the first row
    const float* weight;
    const T* ahead;  // what to fetch meanwhile, so many elements with each input
    int64_t ahead_step;
    float (*sums)[step];
    bool finish;  // whether these are the last inputs, of whole vectors of outputs
  };

  static void run_block(const PackedConvForward& p, const PatchParts<T>& patches, const Task& task, const Block& block,
                        Scratch& scratch) {
    const int channels = task.channels(p);
    const bool last = block.end() == p.patch();
    // each pass over the block fetches its share of what comes next, so that memory is busy all the time
    const T* ahead = unpack(p, task.channel, block, scratch);
    const int64_t tiles = ceil_div(channels, step) * ceil_div(task.last - task.first, most_rows);
    const int64_t ahead_step = ceil_div(panel, tiles);
    for (int64_t j = 0; j < channels; j += step) {
      const int count = static_cast<int>(min(step, channels - j));
      for (int64_t row = task.first; row < task.last;) {
        const int64_t left = task.last - row, rows = ceil_div(left, ceil_div(left, most_rows));  // about as many each
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

  /// Puts a block of the panel into memory as a pass takes it; returns what comes after it.
  static const T* unpack(const PackedConvForward& p, int64_t channel, const Block& block, Scratch& scratch) {
    const int64_t first = block.begin() / 2, pairs = (block.end() + 1) / 2 - first;
    const T* weight = static_cast<const T*>(p.weight) + 2 * (channel * p.pairs() + first * panel);
    for (int64_t k = 0; k < pairs; ++k)  // an odd last one's partner is there, as zeros
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

  // GCC keeps all sums in registers only where it unrolls early, as it is told to here, and where nothing in this
  // function indexes them by a variable; one sum in memory halves the speed.
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
        __builtin_prefetch(ahead, 0, 2);
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
