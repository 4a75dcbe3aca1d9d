// CPU kernels of the depthwise convolution. Two of them are those of plane_kernels.h.
#pragma once

#include "cpu/plane_kernels.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

template <typename T>
struct DepthwiseOp {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;
  using Forward = DepthwiseForward;
  using BackwardWeight = DepthwiseBackwardWeight;
  static constexpr int planes = 1;
  static constexpr bool has_bias = true;

  static DepthwiseSizes plane(const DepthwiseSizes& p) { return p; }
  template <typename Params>
  MOBILEMAMBA_HOST_DEVICE static PixelPlane<T> input(const Params& p, int64_t batch, int64_t channel, int count) {
    return {p.input, p.width, batch, channel, count};
  }
  MOBILEMAMBA_HOST_DEVICE static PixelPlane<T> grad(const DepthwiseBackwardWeight& p, int64_t batch, int64_t channel,
                                                    int count) {
    return {p.grad_output, p.out_width(), batch, channel, count};
  }
  MOBILEMAMBA_HOST_DEVICE static V bias(const DepthwiseForward& p, int64_t channel, int count) {
    return p.bias ? load(static_cast<const Acc*>(p.bias) + channel, count) : V(Acc(0));
  }

  /// The epilogue. Each step is a loop of its own over the row: the row is in L1, and simple loops are fast.
  MOBILEMAMBA_HOST_DEVICE static void write_row(const DepthwiseForward& p, const PlaneTask& task, int64_t y, int count,
                                                V* row) {
    const int64_t width = p.out_width();
    const Activation activation = p.activation;
    const auto line = [&](const Image& image) {
      return static_cast<const T*>(image.data) + task.batch * image.batch + y * image.row + task.channel;
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
    T* out = static_cast<T*>(p.output) + (task.batch * p.out_height() + y) * width * p.output_column + task.channel;
    for (int64_t j = 0; j < width; ++j, out += p.output_column) {
      store(out, row[j], count);
      __builtin_prefetch(next_line(out), 1, 2);
    }
  }
};

template <typename T>
using DepthwiseForwardKernel = PlaneForwardKernel<DepthwiseOp<T>>;
template <typename T>
using DepthwiseBackwardWeightKernel = PlaneBackwardWeightKernel<DepthwiseOp<T>>;

/// Gradient of the input. Every input pixel gathers the gradients of the outputs that it contributed to, so that no two
/// tasks write to one pixel. With stride s, the columns with the same x % s use the same columns of the kernel: they
/// are computed together.
template <typename T>
struct DepthwiseBackwardInputKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;

  static RowWindow<Acc> window(const DepthwiseSizes& p, V* slots) {
    return {slots, p.kernel, plane_columns(p) + p.kernel};
  }

  static size_t scratch_bytes(const DepthwiseBackwardInput& p) {
    return (window(p, nullptr).size() + p.kernel * p.kernel + plane_columns(p) * p.stride) * sizeof(V);
  }

  static int64_t tasks(const DepthwiseBackwardInput& p) { return PlaneTask::count(p, p.height, V::size); }

  static void run(const DepthwiseBackwardInput& p, int64_t begin, int64_t end, std::byte* scratch) {
    const RowWindow<Acc> grad_rows = window(p, reinterpret_cast<V*>(scratch));
    V* weight = grad_rows.slots + grad_rows.size();
    V* row = weight + p.kernel * p.kernel;
    for (int64_t i = 0; i < grad_rows.size(); ++i)
      grad_rows.slots[i] = V(Acc(0));
    for (int64_t i = begin; i < end; ++i) {
      const PlaneTask task(p, p.height, V::size, i);
      const int count = static_cast<int>(min(V::size, p.channels - task.channel));
      if (count == V::size)
        run_task(p, task, V::size, grad_rows, weight, row);
      else
        run_task(p, task, count, grad_rows, weight, row);
    }
  }

  __attribute__((always_inline)) static void run_task(const DepthwiseBackwardInput& p, const PlaneTask& task, int count,
                                                      RowWindow<Acc> grad_rows, V* weight, V* row) {
    const PixelPlane<T> grad(p.grad_output, p.out_width(), task.batch, task.channel, count);
    load_weight<Acc>(p, 1, p.weight, task.channel, count, weight);
    int64_t loaded = 0;
    for (int64_t i = task.begin; i < task.end; ++i) {
      const int64_t pad = p.kernel / 2;
      const int64_t first = ceil_div(max(i - pad, 0), p.stride);
      const int64_t last = min((i + pad) / p.stride + 1, p.out_height());
      grad_rows.load_rows(grad, max(loaded, first), last);
      loaded = last;
      for (int64_t remainder = 0; remainder < p.stride; ++remainder)
        gather_columns(p, grad_rows, weight, i + pad, first, last, remainder, row);
      T* out = static_cast<T*>(p.grad_input) + (task.batch * p.height + i) * p.width * p.channels + task.channel;
      const int64_t width = p.width, channels = p.channels;
      for (int64_t j = 0; j < width; ++j, out += channels) {
        store(out, row[j], count);
        __builtin_prefetch(next_line(out), 1, 2);
      }
    }
  }

  /// Columns x with x % stride == `remainder` of row `bottom` - kernel / 2 of the gradient. Row y of the output's
  /// gradient contributes with row `bottom` - y * stride of the kernel.
  static void gather_columns(const DepthwiseSizes& p, const RowWindow<Acc>& grad_rows, const V* weight, int64_t bottom,
                             int64_t first, int64_t last, int64_t remainder, V* out) {
    constexpr int tile = plane_tile;
    const int64_t kx_first = (remainder + p.kernel / 2) % p.stride, shift = (remainder + p.kernel / 2) / p.stride;
    for (int64_t j = 0; j < plane_columns(p); j += tile) {
      V sum[tile];
      for (int x = 0; x < tile; ++x)
        sum[x] = V(Acc(0));
      const V* row = grad_rows.row(first);
      for (int64_t y = first; y < last; ++y, row = grad_rows.below(row)) {
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

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
