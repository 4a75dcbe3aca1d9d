// CPU kernels of the pointwise convolution: a matrix product with the weight's panels in order, an epilogue on
// registers.
#pragma once

#include "cpu/vec.h"
#include "kernels/pointwise.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// Rows of a task: their inputs stay in the second cache, while the panels of the weight pass by.
constexpr int64_t pointwise_task_rows = 96;

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

/// The epilogue, and the store of `count` outputs of a row.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void finish_pointwise(const PointwiseForward& p, Vec<float> sum, int64_t row, int64_t n,
                                              int count) {
  sum = sum + load(static_cast<const float*>(p.bias) + n, count);
  if (p.activation == Activation::relu) sum = max(sum, Vec<float>(0.0f));
  if (p.residual) sum = sum + load(static_cast<const T*>(p.residual) + row * p.residual_row + n, count);
  store(static_cast<T*>(p.output) + row * p.output_row + n, sum, count);
}

/// The lines that finish_pointwise will read and write: rows are far apart, so the hardware sees no pattern in them.
template <typename T>
MOBILEMAMBA_HOST_DEVICE void prefetch_pointwise(const PointwiseForward& p, int64_t row, int64_t n) {
  __builtin_prefetch(static_cast<T*>(p.output) + row * p.output_row + n, 1);
  if (p.residual) __builtin_prefetch(static_cast<const T*>(p.residual) + row * p.residual_row + n);
}

template <typename T>
struct PointwiseKernel {
  static_assert(sizeof(T) <= 4);
  using V = Vec<float>;
  static constexpr int64_t panel = PointwiseForward::panel;
  static constexpr int vectors = 4;                                             // of a panel at a time
  static constexpr int step = vectors * V::size / 2;                            // outputs that are
  static constexpr int most_rows = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 6 : 3;  // as registers allow

  static int64_t tasks(const PointwiseForward& p) { return ceil_div(p.rows, pointwise_task_rows) * p.panels(); }

  static size_t scratch_bytes(const PointwiseForward& p) {
    return sizeof(T) == 4 ? 0 : ceil_div(pointwise_task_rows * 2 * p.pairs(), V::size) * sizeof(V);
  }

  static void run(const PointwiseForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    int64_t converted = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / p.panels() * pointwise_task_rows, n = task % p.panels() * panel;
      const int64_t last = min(first + pointwise_task_rows, p.rows);
      const float* input;
      int64_t input_row;
      if constexpr (sizeof(T) == 4) {
        input = static_cast<const float*>(p.input) + first * p.input_row;
        input_row = p.input_row;
      } else {
        if (converted != first) convert(p, converted = first, last, reinterpret_cast<float*>(scratch));
        input = reinterpret_cast<const float*>(scratch);
        input_row = 2 * p.pairs();
      }
      const T* weight = static_cast<const T*>(p.weight) + n * 2 * p.pairs();
      for (int64_t row = first; row < last; row += most_rows) {
        // each pass over the panel fetches a part of the next one
        const int64_t pass = (row - first) / most_rows, lines = 2 * panel * sizeof(T) / 64;
        const T* ahead = weight + (pass < lines ? 2 * p.pairs() * panel + pass * (64 / sizeof(T)) : 0);
        for (int64_t j = 0; j < min(panel, p.out_channels - n); j += step) {
          const float* from = input + (row - first) * input_row;
          const int count = static_cast<int>(min(step, p.out_channels - n - j));
          switch (min(most_rows, last - row)) {
            case 6:
              tile<6>(p, from, input_row, weight + j * 2, ahead, row, n + j, count);
              break;
            case 5:
              tile<5>(p, from, input_row, weight + j * 2, ahead, row, n + j, count);
              break;
            case 4:
              tile<4>(p, from, input_row, weight + j * 2, ahead, row, n + j, count);
              break;
            case 3:
              tile<3>(p, from, input_row, weight + j * 2, ahead, row, n + j, count);
              break;
            case 2:
              tile<2>(p, from, input_row, weight + j * 2, ahead, row, n + j, count);
              break;
            default:
              tile<1>(p, from, input_row, weight + j * 2, ahead, row, n + j, count);
          }
        }
      }
    }
  }

 private:
  /// A task's rows in float32.
  static void convert(const PointwiseForward& p, int64_t first, int64_t last, float* to) {
    for (int64_t row = first; row < last; ++row, to += 2 * p.pairs()) {
      const T* from = static_cast<const T*>(p.input) + row * p.input_row;
      for (int64_t k = 0; k < p.in_channels; k += V::size) {
        const int count = static_cast<int>(min(V::size, p.in_channels - k));
        store(to + k, load(from + k, count), count);
      }
    }
  }

  template <int rows>
  static void tile(const PointwiseForward& p, const float* input, int64_t input_row, const T* weight, const T* ahead,
                   int64_t row, int64_t n, int count) {
    V sum[rows][vectors];
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v)
        sum[r][v] = V(0.0f);
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors / 2; ++v)
        prefetch_pointwise<T>(p, row + r, n + v * V::size);
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
    const int64_t whole = p.in_channels / 2 * 2;
    for (int64_t k = 0; k < whole; k += 2)
      add_pair(k, true);
    if (whole < p.in_channels) add_pair(whole, false);

    for (int v = 0; v < vectors / 2; ++v) {
      const int from = v * V::size, left = static_cast<int>(min(V::size, count - from));
      if (left <= 0) break;
      for (int r = 0; r < rows; ++r) {
        const V outputs = add_neighbours(sum[r][2 * v], sum[r][2 * v + 1]);
        if (left == V::size)  // at compile time: whole vectors cost nothing
          finish_pointwise<T>(p, outputs, row + r, n + from, V::size);
        else
          finish_pointwise<T>(p, outputs, row + r, n + from, left);
      }
    }
  }
};

/// The kernel's functions for any element type but float64.
inline int64_t pointwise_tasks(const PointwiseForward& p) {
  return PointwiseKernel<float>::tasks(p);
}
inline size_t pointwise_scratch_bytes(const PointwiseForward& p) {
  return p.dtype == DType::float32 ? 0 : PointwiseKernel<Half>::scratch_bytes(p);
}
inline void run_pointwise(const PointwiseForward& p, int64_t begin, int64_t end, std::byte* scratch) {
  switch (p.dtype) {
    case DType::float32:
      return PointwiseKernel<float>::run(p, begin, end, scratch);
    case DType::float16:
      return PointwiseKernel<Half>::run(p, begin, end, scratch);
    case DType::bfloat16:
      return PointwiseKernel<BFloat16>::run(p, begin, end, scratch);
    case DType::float64:
      __builtin_unreachable();  // a matrix product of torch's
  }
}

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
