// CPU kernels of the Haar convolution: a depthwise convolution of the four sub-bands.
#pragma once

#include "cpu/plane_kernels.h"
#include "kernels/haar.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// `count` channels of an image as four planes, its sub-bands.
template <typename T>
struct HaarPlanes {
  using V = Vec<typename AccumulateOf<T>::type>;
  const T* data;
  int64_t row, column, height, width;
  int count;

  MOBILEMAMBA_HOST_DEVICE HaarPlanes(const HaarSizes& p, const Image& image, int64_t batch, int64_t channel, int count)
      : data(static_cast<const T*>(image.data) + batch * image.batch + channel),
        row(image.row),
        column(image.column),
        height(p.height),
        width(p.width),
        count(count) {}

  MOBILEMAMBA_HOST_DEVICE void load_row(int64_t y, V* to, int64_t next_plane) const {
    const T* from = data + 2 * y * row;
    const bool below = 2 * y + 1 < height;
    for (int64_t x = 0; 2 * x < width; ++x, from += 2 * column) {
      const bool right = 2 * x + 1 < width;
      const V zero = V(0);  // beyond the image
      const HaarBands<V> bands =
          haar(load(from, count), right ? load(from + column, count) : zero, below ? load(from + row, count) : zero,
               right && below ? load(from + row + column, count) : zero);
      for (int band = 0; band < 4; ++band)
        to[band * next_plane + x] = bands.band[band];
      __builtin_prefetch(next_line(from), 0, 2);
      __builtin_prefetch(next_line(from + column), 0, 2);
      __builtin_prefetch(next_line(from + row), 0, 2);
      __builtin_prefetch(next_line(from + row + column), 0, 2);
    }
  }
};

template <typename T>
struct HaarOp {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;
  using Forward = HaarForward;
  using BackwardWeight = HaarBackwardWeight;
  static constexpr int planes = 4;
  static constexpr bool has_bias = false;

  static DepthwiseSizes plane(const HaarSizes& p) {
    return {p.dtype, p.batch, p.channels, p.band_height(), p.band_width(), p.kernel, 1};
  }
  template <typename Params>
  MOBILEMAMBA_HOST_DEVICE static HaarPlanes<T> input(const Params& p, int64_t batch, int64_t channel, int count) {
    return {p, p.input, batch, channel, count};
  }
  MOBILEMAMBA_HOST_DEVICE static HaarPlanes<T> grad(const HaarBackwardWeight& p, int64_t batch, int64_t channel,
                                                    int count) {
    return {p, p.grad_output, batch, channel, count};
  }
  MOBILEMAMBA_HOST_DEVICE static V bias(const HaarForward&, int64_t, int) { return V(Acc(0)); }

  /// The inverse transform of one row of the sub-bands.
  MOBILEMAMBA_HOST_DEVICE static void write_row(const HaarForward& p, const PlaneTask& task, int64_t y, int count,
                                                const V* row) {
    const int64_t columns = plane_columns(plane(p)), line = p.width * p.output_column;
    T* out = static_cast<T*>(p.output) + (task.batch * p.height + 2 * y) * line + task.channel;
    const bool below = 2 * y + 1 < p.height;
    for (int64_t j = 0; j < p.band_width(); ++j, out += 2 * p.output_column) {
      const bool right = 2 * j + 1 < p.width;
      const HaarBands<V> pixels = haar(row[j], row[columns + j], row[2 * columns + j], row[3 * columns + j]);
      store(out, pixels.band[0], count);
      if (right) store(out + p.output_column, pixels.band[1], count);
      if (below) store(out + line, pixels.band[2], count);
      if (right && below) store(out + line + p.output_column, pixels.band[3], count);
    }
  }
};

template <typename T>
using HaarForwardKernel = PlaneForwardKernel<HaarOp<T>>;
template <typename T>
using HaarBackwardWeightKernel = PlaneBackwardWeightKernel<HaarOp<T>>;

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
