// CPU kernels of the convolution on a packed weight: a matrix product with the weight's panels in order, an epilogue on
// registers.
#pragma once

#include "cpu/vec.h"
#include "kernels/packed_conv.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// Most rows of a task: their patches stay in the second cache, while the panels of the weight pass by.
constexpr int64_t packed_conv_task_rows = 96;

/// A task: these rows of the output, one panel of the weight. All tasks have about as many rows, a multiple of `step`.
template <int64_t step>
struct PackedConvTask {
  static_assert(packed_conv_task_rows % step == 0);
  int64_t first, last, channel;

  static int64_t rows(const PackedConvForward& p) {
    return ceil_div(ceil_div(p.rows(), ceil_div(p.rows(), packed_conv_task_rows)), step) * step;
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

/// Two numbers, over and over. As integers: 0 + x is an instruction where x is a floating-point number.
MOBILEMAMBA_HOST_DEVICE Vec<float> repeat_pair(const float* from, bool second) {
  typedef int64_t Pairs __attribute__((vector_size(MOBILEMAMBA_CPU_VECTOR_BYTES)));
  const float pair[2] = {from[0], second ? from[1] : 0.0f};
  int64_t both;
  __builtin_memcpy(&both, second ? from : pair, sizeof both);
  return Vec<float>((Vec<float>::Raw)(Pairs{} + both));
}

/// Sums of neighbouring numbers, first of a and then of b.
MOBILEMAMBA_HOST_DEVICE Vec<float> add_neighbours(Vec<float> a, Vec<float> b) {
#if MOBILEMAMBA_CPU_VECTOR_BYTES == 64
#define MOBILEMAMBA_EVERY_SECOND(i) \
  i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14, i + 16, i + 18, i + 20, i + 22, i + 24, i + 26, i + 28, i + 30
#elif MOBILEMAMBA_CPU_VECTOR_BYTES == 32
#define MOBILEMAMBA_EVERY_SECOND(i) i, i + 2, i + 4, i + 6, i + 8, i + 10, i + 12, i + 14
#else
#define MOBILEMAMBA_EVERY_SECOND(i) i, i + 2, i + 4, i + 6
#endif
  return Vec<float>(__builtin_shufflevector(a.raw, b.raw, MOBILEMAMBA_EVERY_SECOND(0)) +
                    __builtin_shufflevector(a.raw, b.raw, MOBILEMAMBA_EVERY_SECOND(1)));
#undef MOBILEMAMBA_EVERY_SECOND
}

/// The lines that finish_row will read and write: rows are far apart, so the hardware sees no pattern in them.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void prefetch_row(const PackedConvForward& p, int64_t row, int64_t n) {
  __builtin_prefetch(static_cast<T*>(p.output) + row * p.output_row + n, 1);
  if (p.residual) __builtin_prefetch(static_cast<const T*>(p.residual) + row * p.residual_row + n);
}

/// The epilogue, and the store of `count` outputs of a row.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void finish_row(const PackedConvForward& p, Vec<float> sum, int64_t row, int64_t n, int count) {
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + row * p.residual_row + n : nullptr;
  sum = sum + load(static_cast<const float*>(p.bias) + n, count);
  if (residual && p.residual_inside) sum = sum + load(residual, count);
  if (p.activation == Activation::relu) sum = max(sum, Vec<float>(0.0f));
  if (residual && !p.residual_inside) sum = sum + load(residual, count);
  store(static_cast<T*>(p.output) + row * p.output_row + n, sum, count);
}

/// The same for one vector of a panel's `channels` outputs, which starts at `from`.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void finish_vector(const PackedConvForward& p, Vec<float> sum, int64_t row, int64_t channel,
                                           int from, int channels) {
  const int left = channels - from;
  if (left >= Vec<float>::size)  // at compile time: whole vectors cost nothing
    finish_row<T>(p, sum, row, channel + from, Vec<float>::size);
  else if (left > 0)
    finish_row<T>(p, sum, row, channel + from, left);
}

template <typename T>
struct PackedConvKernel {
  static_assert(sizeof(T) <= 4);
  using V = Vec<float>;
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int vectors = 4;                                             // of a panel at a time
  static constexpr int step = vectors * V::size / 2;                            // outputs that are
  static constexpr int most_rows = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 6 : 3;  // as registers allow
  using Task = PackedConvTask<most_rows>;

  static size_t scratch_bytes(const PackedConvForward& p) { return Patches<T, float, 2>::scratch_bytes(p); }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    Patches<T, float, 2> patches;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      patches.set(p, task.first, task.last, scratch);
      const T* weight = static_cast<const T*>(p.weight) + task.channel * 2 * p.pairs();
      for (int64_t row = task.first; row < task.last; row += most_rows) {
        // each pass over the panel fetches a part of the next one
        const int64_t pass = (row - task.first) / most_rows, lines = 2 * panel * sizeof(T) / 64;
        const T* ahead = weight + (pass < lines ? 2 * p.pairs() * panel + pass * (64 / sizeof(T)) : 0);
        const float* input = patches.data + (row - task.first) * patches.row;
        for (int j = 0; j < task.channels(p); j += step) {
          const Tile tile{p, input, patches.row, weight + j * 2, ahead, row, task.channel + j, task.channels(p) - j};
          switch (min(most_rows, task.last - row)) {
            case 6:
              tile.template compute<6>();
              break;
            case 5:
              tile.template compute<5>();
              break;
            case 4:
              tile.template compute<4>();
              break;
            case 3:
              tile.template compute<3>();
              break;
            case 2:
              tile.template compute<2>();
              break;
            default:
              tile.template compute<1>();
          }
        }
      }
    }
  }

 private:
  /// Up to most_rows rows by `step` outputs, whose sums fit the registers.
  struct Tile {
    const PackedConvForward& p;
    const float* input;
    int64_t input_row;
    const T *weight, *ahead;
    int64_t row, channel;
    int channels;

    template <int rows>
    void compute() const {
      V sum[rows][vectors];
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v)
          sum[r][v] = V(0.0f);
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors / 2; ++v)
          prefetch_row<T>(p, row + r, channel + v * V::size);
      const auto add_pair = [&](int64_t k, bool second) __attribute__((always_inline)) {
        V w[vectors];
        __builtin_prefetch(ahead + k * panel);
        for (int v = 0; v < vectors; ++v)
          w[v] = load(weight + k * panel + v * V::size, V::size);
        for (int r = 0; r < rows; ++r) {
          const V x = repeat_pair(input + r * input_row + k, second);
          for (int v = 0; v < vectors; ++v)
            sum[r][v] = sum[r][v] + x * w[v];
        }
      };
      const int64_t whole = p.patch() / 2 * 2;
      for (int64_t k = 0; k < whole; k += 2)
        add_pair(k, true);
      if (whole < p.patch()) add_pair(whole, false);

      for (int v = 0; v < vectors / 2; ++v)
        for (int r = 0; r < rows; ++r)
          finish_vector<T>(p, add_neighbours(sum[r][2 * v], sum[r][2 * v + 1]), row + r, channel, v * V::size,
                           channels);
    }
  };
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
