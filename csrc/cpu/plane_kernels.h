// Depthwise convolution of planes on the CPU, forward and the gradient of its weight: what the depthwise convolution
// (one plane, the image) and the Haar convolution (four planes, the sub-bands) share. A vector holds neighbouring
// channels of one position.
//
// An operator `Op` says how its planes come from an image and where results go:
//   planes, has_bias, Acc              constants and the accumulator type
//   Forward, BackwardWeight            the parameters
//   plane(p)                           the sizes of the convolution of one plane
//   input(p, batch, channel, count)    the planes of the input: load_row(y, to, next_plane) writes row y of every
//                                      plane; the planes are `next_plane` vectors apart
//   grad(p, batch, channel, count)     the same for the output's gradient
//   bias(p, channel, count)            the initial value of the sums
//   write_row(p, task, y, count, row)  stores row y of the result; `row` is (planes, plane_columns)
#pragma once

#include "cpu/vec.h"
#include "kernels/depthwise.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// Columns of the output that share each load of a weight.
constexpr int64_t plane_tile = 4;
/// Rows of the output in one task: so few that one image keeps several threads busy.
constexpr int64_t plane_task_rows = 16;
/// Channels of one task of the weight's gradient: whole cache lines of every element type.
constexpr int64_t plane_task_channels = 64;

/// Columns of the output, rounded up to whole tiles.
inline int64_t plane_columns(const DepthwiseSizes& plane) {
  return ceil_div(plane.out_width(), plane_tile) * plane_tile;
}

/// The next cache line, for a prefetch. It holds the next channels of the same pixel, which the next task reads or
/// writes. The hardware does not prefetch it, because the pixels of one task are too far apart.
template <typename T>
MOBILEMAMBA_HOST_DEVICE const T* next_line(const T* at) {
  return at + 64 / sizeof(T);
}

/// A task: rows [begin, end) of one vector of channels of one batch entry.
struct PlaneTask {
  int64_t batch, channel, begin, end;

  static int64_t count(const DepthwiseSizes& plane, int64_t height, int64_t lanes) {
    return plane.batch * ceil_div(height, plane_task_rows) * ceil_div(plane.channels, lanes);
  }

  PlaneTask(const DepthwiseSizes& plane, int64_t height, int64_t lanes, int64_t index) {
    const int64_t bands = ceil_div(height, plane_task_rows), blocks = ceil_div(plane.channels, lanes);
    batch = index / (bands * blocks);
    channel = index % blocks * lanes;
    begin = index / blocks % bands * plane_task_rows;
    end = min(begin + plane_task_rows, height);
  }
};

/// `count` channels of an image as its only plane.
template <typename T>
struct PixelPlane {
  using V = Vec<typename AccumulateOf<T>::type>;
  const T* data;
  int64_t row, column, width;
  int count;

  MOBILEMAMBA_HOST_DEVICE PixelPlane(const Image& image, int64_t width, int64_t batch, int64_t channel, int count)
      : data(static_cast<const T*>(image.data) + batch * image.batch + channel),
        row(image.row),
        column(image.column),
        width(width),
        count(count) {}

  MOBILEMAMBA_HOST_DEVICE void load_row(int64_t y, V* to, int64_t) const {
    const T* from = data + y * row;
    for (int64_t x = 0; x < width; ++x, from += column) {
      to[x] = load(from, count);
      __builtin_prefetch(next_line(from), 0, 2);
    }
  }
};

/// The rows of a plane under the kernel, in the accumulator type, as the kernel moves down. Row y is in slot y %
/// kernel, so that each row is read and converted once. Zeros pad both sides of a row. The windows of an operator's
/// planes are adjacent; this is the first.
template <typename Acc>
struct RowWindow {
  using V = Vec<Acc>;
  V* slots;
  int64_t kernel, width;

  int64_t size() const { return kernel * width; }
  RowWindow plane(int i) const { return {slots + i * size(), kernel, width}; }

  /// Loads rows [first, last) of all planes.
  template <typename Source>
  MOBILEMAMBA_HOST_DEVICE void load_rows(const Source& source, int64_t first, int64_t last) {
    for (int64_t y = first; y < last; ++y)
      source.load_row(y, slots + y % kernel * width + kernel / 2, size());
  }

  const V* row(int64_t y) const { return slots + y % kernel * width; }
  /// The row below `row`.
  const V* below(const V* row) const { return row + width == slots + size() ? slots : row + width; }
};

/// Copies the weights of one vector of channels, (planes, k, k), to adjacent vectors.
template <typename Acc>
MOBILEMAMBA_HOST_DEVICE void load_weight(const DepthwiseSizes& plane, int planes, const void* from, int64_t channel,
                                         int count, Vec<Acc>* weight) {
  for (int64_t i = 0; i < planes * plane.kernel * plane.kernel; ++i)
    weight[i] = load(static_cast<const Acc*>(from) + i * plane.channels + channel, count);
}

/// Calls run.operator()<kernel, stride>() with the sizes if models use them, with <0, 0> for other sizes.
template <typename Run>
MOBILEMAMBA_HOST_DEVICE auto for_kernel_size(const DepthwiseSizes& plane, Run run) {
  const auto with_stride = [&]<int kernel>() __attribute__((always_inline)) {
    return plane.stride == 1 ? run.template operator()<kernel, 1>() : run.template operator()<kernel, 2>();
  };
  if (plane.stride <= 2) switch (plane.kernel) {
      case 3:
        return with_stride.template operator()<3>();
      case 5:
        return with_stride.template operator()<5>();
      case 7:
        return with_stride.template operator()<7>();
    }
  return run.template operator()<0, 0>();
}

// Forward ------------------------------------------------------------------------------------------------------------

/// Computes one row of the output of every plane, without the epilogue. The kernel's first row is over row `top` of the
/// plane. The rows [first, last) of the plane are under the kernel.
template <typename Acc, int fixed_kernel, int fixed_stride>
void convolve_row(RowWindow<Acc> window, int planes, int64_t any_stride, int64_t columns, const Vec<Acc>* weight,
                  int64_t top, int64_t first, int64_t last, Vec<Acc> bias, Vec<Acc>* out) {
  using V = Vec<Acc>;
  constexpr int tile = plane_tile;
  const int64_t kernel = fixed_kernel ? fixed_kernel : window.kernel, stride = fixed_kernel ? fixed_stride : any_stride;
  window.kernel = kernel;  // a constant, if it is fixed
  for (; planes > 0; --planes, window.slots += window.size(), weight += kernel * kernel, out += columns)
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

template <typename Op>
struct PlaneForwardKernel {
  using Params = typename Op::Forward;
  using Acc = typename Op::Acc;
  using V = Vec<Acc>;

  static RowWindow<Acc> window(const DepthwiseSizes& plane, V* slots) {
    return {slots, plane.kernel, plane_columns(plane) * plane.stride + plane.kernel};
  }

  static size_t scratch_bytes(const Params& p) {
    const DepthwiseSizes plane = Op::plane(p);
    const int64_t taps = plane.kernel * plane.kernel;
    return Op::planes * (window(plane, nullptr).size() + taps + plane_columns(plane)) * sizeof(V);
  }

  static int64_t tasks(const Params& p) {
    const DepthwiseSizes plane = Op::plane(p);
    return PlaneTask::count(plane, plane.out_height(), V::size);
  }

  static void run(const Params& p, int64_t begin, int64_t end, std::byte* scratch) {
    const DepthwiseSizes plane = Op::plane(p);
    const RowWindow<Acc> windows = window(plane, reinterpret_cast<V*>(scratch));
    V* weight = windows.slots + Op::planes * windows.size();     // (planes, k, k)
    V* row = weight + Op::planes * plane.kernel * plane.kernel;  // (planes, columns)
    for (int64_t i = 0; i < Op::planes * windows.size(); ++i)
      windows.slots[i] = V(Acc(0));
    for (int64_t i = begin; i < end; ++i) {
      const PlaneTask task(plane, plane.out_height(), V::size, i);
      const int count = static_cast<int>(min(V::size, plane.channels - task.channel));
      if (count == V::size)
        run_task(p, plane, task, V::size, windows, weight, row);
      else
        run_task(p, plane, task, count, windows, weight, row);
    }
  }

  __attribute__((always_inline)) static void run_task(const Params& p, const DepthwiseSizes& plane,
                                                      const PlaneTask& task, int count, RowWindow<Acc> windows,
                                                      V* weight, V* row) {
    const auto convolve = for_kernel_size(plane, []<int kernel, int stride>() __attribute__((always_inline)) {
      return convolve_row<Acc, kernel, stride>;
    });
    const int64_t kernel = plane.kernel, columns = plane_columns(plane);
    const auto source = Op::input(p, task.batch, task.channel, count);
    load_weight<Acc>(plane, Op::planes, p.weight, task.channel, count, weight);
    const V bias = Op::bias(p, task.channel, count);
    int64_t loaded = 0;
    for (int64_t y = task.begin; y < task.end; ++y) {
      const int64_t top = y * plane.stride - kernel / 2;
      const int64_t first = max(top, 0), last = min(top + kernel, plane.height);
      windows.load_rows(source, max(loaded, first), last);
      loaded = last;
      convolve(windows, Op::planes, plane.stride, columns, weight, top, first, last, bias, row);
      Op::write_row(p, task, y, count, row);
    }
  }
};

// Gradient of the weight ---------------------------------------------------------------------------------------------

/// Adds the contribution of one row of the output to one row of the weight's gradient.
template <typename Acc, int fixed_kernel, int fixed_stride>
void correlate_row(int64_t any_kernel, int64_t any_stride, int64_t width, const Vec<Acc>* grad, const Vec<Acc>* input,
                   Vec<Acc>* sums) {
  using V = Vec<Acc>;
  constexpr int columns = fixed_kernel ? fixed_kernel : 1;  // of the kernel that share each load of grad
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

template <typename Op>
struct PlaneBackwardWeightKernel {
  using Params = typename Op::BackwardWeight;
  using Acc = typename Op::Acc;
  using V = Vec<Acc>;
  static constexpr int64_t task_vectors = plane_task_channels / V::size;

  static RowWindow<Acc> window(const DepthwiseSizes& plane, V* slots) {
    return {slots, plane.kernel, plane.out_width() * plane.stride + plane.kernel};
  }

  /// Gradients of one channel: of its weights, and with has_bias of its bias last.
  static int64_t entries(const DepthwiseSizes& plane) {
    return Op::planes * plane.kernel * plane.kernel + (Op::has_bias ? 1 : 0);
  }

  static size_t scratch_bytes(const Params& p) {
    const DepthwiseSizes plane = Op::plane(p);
    const int64_t rows = Op::planes * (window(plane, nullptr).size() + plane.out_width());
    return (rows + task_vectors * entries(plane)) * sizeof(V);
  }

  /// A task sums over one slab of the batch, in order, for neighbouring vectors of channels.
  static int64_t tasks(const Params& p) { return p.slabs * ceil_div(p.channels, plane_task_channels); }

  static void run(const Params& p, int64_t begin, int64_t end, std::byte* scratch) {
    const DepthwiseSizes plane = Op::plane(p);
    const RowWindow<Acc> windows = window(plane, reinterpret_cast<V*>(scratch));
    V* grad_row = windows.slots + Op::planes * windows.size();  // (planes, width)
    V* sums = grad_row + Op::planes * plane.out_width();        // (vectors, entries)
    for (int64_t i = 0; i < Op::planes * windows.size(); ++i)
      windows.slots[i] = V(Acc(0));
    const int64_t groups = ceil_div(p.channels, plane_task_channels);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slab = task / groups, first = task % groups * plane_task_channels;
      const int64_t last = min(first + plane_task_channels, p.channels);
      for (int64_t i = 0; i < task_vectors * entries(plane); ++i)
        sums[i] = V(Acc(0));
      for (int64_t batch = p.batch * slab / p.slabs; batch < p.batch * (slab + 1) / p.slabs; ++batch)
        for (int64_t c = first; c < last; c += V::size) {
          V* vector_sums = sums + (c - first) / V::size * entries(plane);
          if (c + V::size <= last)
            add_image(p, plane, batch, c, V::size, windows, grad_row, vector_sums);
          else
            add_image(p, plane, batch, c, static_cast<int>(last - c), windows, grad_row, vector_sums);
        }
      Acc* out = static_cast<Acc*>(p.sums) + slab * entries(plane) * p.channels;
      for (int64_t c = first; c < last; c += V::size)
        for (int64_t i = 0; i < entries(plane); ++i)
          store(out + i * p.channels + c, sums[(c - first) / V::size * entries(plane) + i],
                static_cast<int>(min(V::size, last - c)));
    }
  }

  __attribute__((always_inline)) static void add_image(const Params& p, const DepthwiseSizes& plane, int64_t batch,
                                                       int64_t channel, int count, RowWindow<Acc> windows, V* grad_row,
                                                       V* sums) {
    const auto correlate = for_kernel_size(plane, []<int kernel, int stride>() __attribute__((always_inline)) {
      return correlate_row<Acc, kernel, stride>;
    });
    const int64_t kernel = plane.kernel, width = plane.out_width();
    const auto input = Op::input(p, batch, channel, count), grad = Op::grad(p, batch, channel, count);
    int64_t loaded = 0;
    for (int64_t y = 0; y < plane.out_height(); ++y) {
      grad.load_row(y, grad_row, width);
      if constexpr (Op::has_bias) {
        V row_sum = V(Acc(0));
        for (int64_t j = 0; j < width; ++j)
          row_sum = row_sum + grad_row[j];
        V& bias_sum = sums[Op::planes * kernel * kernel];
        bias_sum = bias_sum + row_sum;
      }
      const int64_t top = y * plane.stride - kernel / 2, first = max(top, 0), last = min(top + kernel, plane.height);
      windows.load_rows(input, max(loaded, first), last);
      loaded = last;
      for (int i = 0; i < Op::planes; ++i)
        for (int64_t from = first; from < last; ++from)
          correlate(kernel, plane.stride, width, grad_row + i * width, windows.plane(i).row(from),
                    sums + (i * kernel + from - top) * kernel);
    }
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
