// CPU kernels of the depthwise convolution. A vector holds neighbouring channels of one pixel.
#pragma once

#include "cpu/vec.h"
#include "kernels/depthwise.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// Columns of the result that share each load of a weight.
constexpr int64_t depthwise_tile = 4;
/// Rows of the result in one task: few enough that a single image keeps several threads busy.
constexpr int64_t depthwise_task_rows = 16;
/// Channels of one task of the weight's gradient: whole cache lines of every element type.
constexpr int64_t depthwise_task_channels = 64;

/// Columns of the output, rounded up to whole tiles.
inline int64_t depthwise_columns(const DepthwiseSizes& p) {
  return ceil_div(p.out_width(), depthwise_tile) * depthwise_tile;
}

/// The next cache line. It holds the same pixel for the next vector of channels, that is for the next task: in an image
/// whose channels are contiguous, what one task reads or writes is too far apart for the hardware to see a pattern.
template <typename T>
MOBILEMAMBA_HOST_DEVICE const T* next_line(const T* at) {
  return at + 64 / sizeof(T);
}

/// What a task computes: rows [begin, end) of one vector of channels of one batch entry.
struct DepthwiseTask {
  int64_t batch, channel, begin, end;

  static int64_t count(const DepthwiseSizes& p, int64_t height, int64_t lanes) {
    return p.batch * ceil_div(height, depthwise_task_rows) * ceil_div(p.channels, lanes);
  }

  DepthwiseTask(const DepthwiseSizes& p, int64_t height, int64_t lanes, int64_t index) {
    const int64_t bands = ceil_div(height, depthwise_task_rows), blocks = ceil_div(p.channels, lanes);
    batch = index / (bands * blocks);
    channel = index % blocks * lanes;
    begin = index / blocks % bands * depthwise_task_rows;
    end = min(begin + depthwise_task_rows, height);
  }
};

/// The rows of an image that a kernel lies over, in the type of sums, as it moves down: row i is in slot i % kernel, so
/// that each is read and converted once. On both sides of a row are zeros.
template <typename Acc>
struct RowWindow {
  using V = Vec<Acc>;
  V* slots;
  int64_t kernel, width;

  RowWindow(V* slots, int64_t kernel, int64_t width) : slots(slots), kernel(kernel), width(width) {
    for (int64_t i = 0; i < kernel * width; ++i)
      slots[i] = V(Acc(0));
  }

  /// Brings in rows [first, last).
  template <typename T>
  MOBILEMAMBA_HOST_DEVICE void load_rows(const T* image, const Image& strides, int64_t columns, int64_t first,
                                         int64_t last, int count) {
    for (int64_t i = first; i < last; ++i) {
      const T* from = image + i * strides.row;
      V* to = slots + i % kernel * width + kernel / 2;
      for (int64_t j = 0; j < columns; ++j, from += strides.column) {
        to[j] = load(from, count);
        __builtin_prefetch(next_line(from), 0, 2);
      }
    }
  }

  const V* row(int64_t i) const { return slots + i % kernel * width; }
  /// The row below this one.
  const V* below(const V* row) const { return row + width == slots + kernel * width ? slots : row + width; }
};

/// The weights of one vector of channels, side by side.
template <typename Acc>
MOBILEMAMBA_HOST_DEVICE void load_weight(const DepthwiseSizes& p, const void* from, int64_t channel, int count,
                                         Vec<Acc>* weight) {
  for (int64_t i = 0; i < p.kernel * p.kernel; ++i)
    weight[i] = load(static_cast<const Acc*>(from) + i * p.channels + channel, count);
}

/// One row of the output before the epilogue. The kernel's first row lies over image row `top`; of its rows those over
/// [first, last) are in the image. A kernel of 0 stands for any size, with any stride.
template <typename Acc, int fixed_kernel, int fixed_stride>
void convolve_row(RowWindow<Acc> window, int64_t any_stride, int64_t columns, const Vec<Acc>* weight, int64_t top,
                  int64_t first, int64_t last, Vec<Acc> bias, Vec<Acc>* out) {
  using V = Vec<Acc>;
  constexpr int tile = depthwise_tile;
  const int64_t kernel = fixed_kernel ? fixed_kernel : window.kernel, stride = fixed_kernel ? fixed_stride : any_stride;
  window.kernel = kernel;  // known to the compiler, where it is fixed
  for (int64_t j = 0; j < columns; j += tile) {
    V sum[tile];
    for (int x = 0; x < tile; ++x)
      sum[x] = bias;
    const V *row = window.row(first), *w = weight + (first - top) * kernel;
    for (int64_t i = first; i < last; ++i, row = window.below(row), w += kernel) {
      const V* from = row + j * stride;
      if constexpr (fixed_kernel) {
        V under[(tile - 1) * fixed_stride + fixed_kernel];
        for (int x = 0; x < (tile - 1) * fixed_stride + fixed_kernel; ++x)
          under[x] = from[x];
        keep_loaded();
        for (int kx = 0; kx < fixed_kernel; ++kx)
          for (int x = 0; x < tile; ++x)
            sum[x] = sum[x] + w[kx] * under[x * fixed_stride + kx];
      } else {
        for (int64_t kx = 0; kx < kernel; ++kx)
          for (int x = 0; x < tile; ++x)
            sum[x] = sum[x] + w[kx] * from[x * stride + kx];
      }
    }
    for (int x = 0; x < tile; ++x)
      out[j + x] = sum[x];
  }
}

template <typename T>
struct DepthwiseForwardKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;

  static int64_t padded_width(const DepthwiseSizes& p) { return depthwise_columns(p) * p.stride + p.kernel; }

  static size_t scratch_bytes(const DepthwiseForward& p) {
    return (p.kernel * (padded_width(p) + p.kernel) + depthwise_columns(p)) * sizeof(V);
  }

  static int64_t tasks(const DepthwiseForward& p) { return DepthwiseTask::count(p, p.out_height(), V::size); }

  static void run(const DepthwiseForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    RowWindow<Acc> window(reinterpret_cast<V*>(scratch), p.kernel, padded_width(p));
    V* weight = window.slots + p.kernel * window.width;
    V* row = weight + p.kernel * p.kernel;
    for (int64_t i = begin; i < end; ++i) {
      const DepthwiseTask task(p, p.out_height(), V::size, i);
      const int count = static_cast<int>(min(V::size, p.channels - task.channel));
      if (count == V::size)
        run_task(p, task, V::size, window, weight, row);
      else
        run_task(p, task, count, window, weight, row);
    }
  }

  static auto convolution(const DepthwiseSizes& p) {
#define MOBILEMAMBA_DEPTHWISE(kernel_, stride_) \
  if (p.kernel == kernel_ && p.stride == stride_) return convolve_row<Acc, kernel_, stride_>
    MOBILEMAMBA_DEPTHWISE(3, 1);
    MOBILEMAMBA_DEPTHWISE(3, 2);
    MOBILEMAMBA_DEPTHWISE(5, 1);
    MOBILEMAMBA_DEPTHWISE(5, 2);
    MOBILEMAMBA_DEPTHWISE(7, 1);
    MOBILEMAMBA_DEPTHWISE(7, 2);
#undef MOBILEMAMBA_DEPTHWISE
    return convolve_row<Acc, 0, 0>;
  }

  __attribute__((always_inline)) static void run_task(const DepthwiseForward& p, const DepthwiseTask& task, int count,
                                                      RowWindow<Acc>& window, V* weight, V* row) {
    const auto convolve = convolution(p);
    const int64_t columns = depthwise_columns(p);
    const T* image = static_cast<const T*>(p.input.data) + task.batch * p.input.batch + task.channel;
    load_weight<Acc>(p, p.weight, task.channel, count, weight);
    const V bias = p.bias ? load(static_cast<const Acc*>(p.bias) + task.channel, count) : V(Acc(0));
    int64_t loaded = 0;
    for (int64_t i = task.begin; i < task.end; ++i) {
      const int64_t top = i * p.stride - p.kernel / 2;
      const int64_t first = max(top, 0), last = min(top + p.kernel, p.height);
      window.load_rows(image, p.input, p.width, max(loaded, first), last, count);
      loaded = last;
      convolve(window, p.stride, columns, weight, top, first, last, bias, row);
      write_row(p, task, i, count, row);
    }
  }

  /// The epilogue, one step after the other: the row is near, and a loop of one purpose is quick.
  __attribute__((always_inline)) static void write_row(const DepthwiseForward& p, const DepthwiseTask& task, int64_t i,
                                                       int count, V* row) {
    const int64_t width = p.out_width();
    const Activation activation = p.activation;
    const auto line = [&](const Image& image) {
      return static_cast<const T*>(image.data) + task.batch * image.batch + i * image.row + task.channel;
    };
    if (p.grad_output.data) {
      const T* from = line(p.grad_output);
      for (int64_t j = 0; j < width; ++j)
        row[j] = load(from + j * p.grad_output.column, count) * activate_derivative(activation, row[j]);
    } else if (activation != Activation::none) {
      for (int64_t j = 0; j < width; ++j)
        row[j] = activate(activation, row[j]);
    }
    if (p.residual.data) {
      const T* from = line(p.residual);
      for (int64_t j = 0; j < width; ++j)
        row[j] = row[j] + load(from + j * p.residual.column, count);
    }
    if (p.scale) {
      const V scale = load(static_cast<const Acc*>(p.scale) + task.channel, count);
      const V shift = load(static_cast<const Acc*>(p.shift) + task.channel, count);
      for (int64_t j = 0; j < width; ++j)
        row[j] = max(scale * row[j] + shift, V(Acc(0)));
    }
    T* out = static_cast<T*>(p.output) + (task.batch * p.out_height() + i) * width * p.output_column + task.channel;
    for (int64_t j = 0; j < width; ++j, out += p.output_column) {
      store(out, row[j], count);
      __builtin_prefetch(next_line(out), 1, 2);
    }
  }
};

/// Every input pixel gathers from the outputs that it went into, so that tasks write apart from each other. The columns
/// of one remainder modulo the stride see one part of the kernel's columns, and are convolved with it together.
template <typename T>
struct DepthwiseBackwardInputKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;

  static int64_t padded_width(const DepthwiseSizes& p) { return depthwise_columns(p) + p.kernel; }

  static size_t scratch_bytes(const DepthwiseBackwardInput& p) {
    return (p.kernel * (padded_width(p) + p.kernel) + depthwise_columns(p) * p.stride) * sizeof(V);
  }

  static int64_t tasks(const DepthwiseBackwardInput& p) { return DepthwiseTask::count(p, p.height, V::size); }

  static void run(const DepthwiseBackwardInput& p, int64_t begin, int64_t end, std::byte* scratch) {
    RowWindow<Acc> window(reinterpret_cast<V*>(scratch), p.kernel, padded_width(p));
    V* weight = window.slots + p.kernel * window.width;
    V* row = weight + p.kernel * p.kernel;
    for (int64_t i = begin; i < end; ++i) {
      const DepthwiseTask task(p, p.height, V::size, i);
      const int count = static_cast<int>(min(V::size, p.channels - task.channel));
      if (count == V::size)
        run_task(p, task, V::size, window, weight, row);
      else
        run_task(p, task, count, window, weight, row);
    }
  }

  __attribute__((always_inline)) static void run_task(const DepthwiseBackwardInput& p, const DepthwiseTask& task,
                                                      int count, RowWindow<Acc>& window, V* weight, V* row) {
    const T* grad = static_cast<const T*>(p.grad_output.data) + task.batch * p.grad_output.batch + task.channel;
    load_weight<Acc>(p, p.weight, task.channel, count, weight);
    int64_t loaded = 0;
    for (int64_t i = task.begin; i < task.end; ++i) {
      const int64_t pad = p.kernel / 2;
      const int64_t first = ceil_div(max(i - pad, 0), p.stride);
      const int64_t last = min((i + pad) / p.stride + 1, p.out_height());
      window.load_rows(grad, p.grad_output, p.out_width(), max(loaded, first), last, count);
      loaded = last;
      for (int64_t remainder = 0; remainder < p.stride; ++remainder)
        gather_columns(p, window, weight, i + pad, first, last, remainder, row);
      T* out = static_cast<T*>(p.grad_input) + (task.batch * p.height + i) * p.width * p.channels + task.channel;
      const int64_t width = p.width, channels = p.channels;
      for (int64_t j = 0; j < width; ++j, out += channels) {
        store(out, row[j], count);
        __builtin_prefetch(next_line(out), 1, 2);
      }
    }
  }

  /// Row `bottom` - kernel / 2 of the gradient, of which output row y holds row `bottom` - y * stride of the kernel.
  static void gather_columns(const DepthwiseSizes& p, const RowWindow<Acc>& window, const V* weight, int64_t bottom,
                             int64_t first, int64_t last, int64_t remainder, V* out) {
    constexpr int tile = depthwise_tile;
    const int64_t kx_first = (remainder + p.kernel / 2) % p.stride, shift = (remainder + p.kernel / 2) / p.stride;
    for (int64_t j = 0; j < depthwise_columns(p); j += tile) {
      V sum[tile];
      for (int x = 0; x < tile; ++x)
        sum[x] = V(Acc(0));
      const V* row = window.row(first);
      for (int64_t y = first; y < last; ++y, row = window.below(row)) {
        const V *from = row + p.kernel / 2 + j + shift, *w = weight + (bottom - y * p.stride) * p.kernel;
        for (int64_t kx = kx_first; kx < p.kernel; kx += p.stride, --from)
          for (int x = 0; x < tile; ++x)
            sum[x] = sum[x] + w[kx] * from[x];
      }
      for (int x = 0; x < tile; ++x)
        out[(j + x) * p.stride + remainder] = sum[x];
    }
  }
};

/// Adds to one row of the weight's gradient what one row of the output contributes. A kernel of 0 stands for any size,
/// with any stride.
template <typename Acc, int fixed_kernel, int fixed_stride>
void correlate_row(int64_t any_kernel, int64_t any_stride, int64_t width, const Vec<Acc>* grad, const Vec<Acc>* input,
                   Vec<Acc>* sums) {
  using V = Vec<Acc>;
  constexpr int columns = fixed_kernel ? fixed_kernel : 1;  // of the kernel at a time: they share each load of grad
  const int64_t kernel = fixed_kernel ? fixed_kernel : any_kernel, stride = fixed_kernel ? fixed_stride : any_stride;
  for (int64_t kx = 0; kx < kernel; kx += columns) {
    V sum[columns];
    for (int x = 0; x < columns; ++x)
      sum[x] = V(Acc(0));
    for (int64_t j = 0; j < width; ++j)
      for (int x = 0; x < columns; ++x)
        sum[x] = sum[x] + grad[j] * input[j * stride + kx + x];
    for (int x = 0; x < columns; ++x)
      sums[kx + x] = sums[kx + x] + sum[x];
  }
}

template <typename T>
struct DepthwiseBackwardWeightKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;
  static constexpr int64_t task_vectors = depthwise_task_channels / V::size;

  static int64_t padded_width(const DepthwiseSizes& p) { return p.out_width() * p.stride + p.kernel; }

  static int64_t entries(const DepthwiseSizes& p) { return p.kernel * p.kernel + 1; }

  static size_t scratch_bytes(const DepthwiseBackwardWeight& p) {
    return (p.kernel * padded_width(p) + p.out_width() + task_vectors * entries(p)) * sizeof(V);
  }

  /// A task sums over a slab of the batch, in order, for some neighbouring vectors of channels.
  static int64_t tasks(const DepthwiseBackwardWeight& p) {
    return p.slabs * ceil_div(p.channels, depthwise_task_channels);
  }

  static void run(const DepthwiseBackwardWeight& p, int64_t begin, int64_t end, std::byte* scratch) {
    RowWindow<Acc> window(reinterpret_cast<V*>(scratch), p.kernel, padded_width(p));
    V* grad_row = window.slots + p.kernel * window.width;
    V* sums = grad_row + p.out_width();  // (vectors, k * k + 1)
    const int64_t groups = ceil_div(p.channels, depthwise_task_channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / groups, first = task % groups * depthwise_task_channels;
      const int64_t last = min(first + depthwise_task_channels, p.channels);
      for (int64_t i = 0; i < task_vectors * entries(p); ++i)
        sums[i] = V(Acc(0));
      for (int64_t batch = p.batch * slab / p.slabs; batch < p.batch * (slab + 1) / p.slabs; ++batch)
        for (int64_t c = first; c < last; c += V::size) {
          V* vector_sums = sums + (c - first) / V::size * entries(p);
          if (c + V::size <= last)
            add_image(p, batch, c, V::size, window, grad_row, vector_sums);
          else
            add_image(p, batch, c, static_cast<int>(last - c), window, grad_row, vector_sums);
        }
      Acc* out = static_cast<Acc*>(p.sums) + slab * entries(p) * p.channels;
      for (int64_t c = first; c < last; c += V::size)
        for (int64_t i = 0; i < entries(p); ++i)
          store(out + i * p.channels + c, sums[(c - first) / V::size * entries(p) + i],
                static_cast<int>(min(V::size, last - c)));
    }
  }

  static auto correlation(const DepthwiseSizes& p) {
#define MOBILEMAMBA_DEPTHWISE(kernel_, stride_) \
  if (p.kernel == kernel_ && p.stride == stride_) return correlate_row<Acc, kernel_, stride_>
    MOBILEMAMBA_DEPTHWISE(3, 1);
    MOBILEMAMBA_DEPTHWISE(3, 2);
    MOBILEMAMBA_DEPTHWISE(5, 1);
    MOBILEMAMBA_DEPTHWISE(5, 2);
    MOBILEMAMBA_DEPTHWISE(7, 1);
    MOBILEMAMBA_DEPTHWISE(7, 2);
#undef MOBILEMAMBA_DEPTHWISE
    return correlate_row<Acc, 0, 0>;
  }

  __attribute__((always_inline)) static void add_image(const DepthwiseBackwardWeight& p, int64_t batch, int64_t channel,
                                                       int count, RowWindow<Acc>& window, V* grad_row, V* sums) {
    const auto correlate = correlation(p);
    const int64_t kernel = p.kernel, width = p.out_width(), column = p.grad_output.column;
    const T* image = static_cast<const T*>(p.input.data) + batch * p.input.batch + channel;
    const T* grad = static_cast<const T*>(p.grad_output.data) + batch * p.grad_output.batch + channel;
    V& bias_sum = sums[kernel * kernel];
    int64_t loaded = 0;
    for (int64_t i = 0; i < p.out_height(); ++i) {
      const T* from = grad + i * p.grad_output.row;
      V row_sum = V(Acc(0));
      for (int64_t j = 0; j < width; ++j, from += column) {
        grad_row[j] = load(from, count);
        row_sum = row_sum + grad_row[j];
        __builtin_prefetch(next_line(from), 0, 2);
      }
      bias_sum = bias_sum + row_sum;
      const int64_t top = i * p.stride - kernel / 2, first = max(top, 0), last = min(top + kernel, p.height);
      window.load_rows(image, p.input, p.width, max(loaded, first), last, count);
      loaded = last;
      for (int64_t y = first; y < last; ++y)
        correlate(kernel, p.stride, width, grad_row, window.row(y), sums + (y - top) * kernel);
    }
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
