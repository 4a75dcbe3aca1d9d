// CPU kernels of the Haar convolution. A vector holds neighbouring channels of one pixel.
#pragma once

#include "cpu/vec.h"
#include "kernels/haar.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// The 2x2 patch of pixels under one position of the half-resolution plane, zero beyond the image.
template <typename T, typename V>
struct Patch {
  V a, b, c, d;

  Patch(const HaarSizes& p, const T* image, const Image& strides, int64_t i, int64_t j, int count) {
    const T* at = image + 2 * i * strides.row + 2 * j * strides.column;
    const bool right = 2 * j + 1 < p.width, below = 2 * i + 1 < p.height;
    const V zero = V(0);
    a = load(at, count);
    b = right ? load(at + strides.column, count) : zero;
    c = below ? load(at + strides.row, count) : zero;
    d = right && below ? load(at + strides.row + strides.column, count) : zero;
  }
};

template <typename T>
struct HaarForwardKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;
  /// Output columns that share each load of a weight.
  static constexpr int tile = 4;

  static int64_t padded_height(const HaarSizes& p) { return p.band_height() + p.kernel - 1; }
  static int64_t padded_width(const HaarSizes& p) { return ceil_div(p.band_width(), tile) * tile + p.kernel - 1; }

  static size_t scratch_bytes(const HaarForward& p) {
    return 4 * (padded_height(p) * padded_width(p) + ceil_div(p.band_width(), tile) * tile) * sizeof(V);
  }

  static int64_t tasks(const HaarForward& p) { return p.batch * ceil_div(p.channels, V::size); }

  static void run(const HaarForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    V* bands = reinterpret_cast<V*>(scratch);                 // (4, padded height, padded width), the border zero
    V* row = bands + 4 * padded_height(p) * padded_width(p);  // (4, band width): convolved
    for (int64_t i = 0; i < 4 * padded_height(p) * padded_width(p); ++i)
      bands[i] = V(Acc(0));
    const int64_t blocks = ceil_div(p.channels, V::size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / blocks, c = task % blocks * V::size;
      const int count = static_cast<int>(min(V::size, p.channels - c));
      if (count == V::size)
        run_channels(p, batch, c, V::size, bands, row);
      else
        run_channels(p, batch, c, count, bands, row);
    }
  }

  __attribute__((always_inline)) static void run_channels(const HaarForward& p, int64_t batch, int64_t c, int count,
                                                          V* bands, V* row) {
    const int64_t width = padded_width(p), plane = padded_height(p) * width, pad = p.kernel / 2;
    const T* image = static_cast<const T*>(p.input.data) + batch * p.input.batch + c;
    for (int64_t i = 0; i < p.band_height(); ++i)
      for (int64_t j = 0; j < p.band_width(); ++j) {
        const Patch<T, V> patch(p, image, p.input, i, j, count);
        const HaarBands<V> transformed = haar(patch.a, patch.b, patch.c, patch.d);
        for (int band = 0; band < 4; ++band)
          bands[band * plane + (i + pad) * width + j + pad] = transformed.band[band];
      }
    for (int64_t i = 0; i < p.band_height(); ++i) {
      for (int band = 0; band < 4; ++band)
        convolve_row(p, band, i, c, count, bands + band * plane, row);
      write_row(p, batch, i, c, count, row);
    }
  }

  __attribute__((always_inline)) static void convolve_row(const HaarForward& p, int band, int64_t i, int64_t c,
                                                          int count, const V* plane, V* row) {
    const int64_t width = padded_width(p), k = p.kernel, pad = k / 2, columns = ceil_div(p.band_width(), tile) * tile;
    const Acc* weight = static_cast<const Acc*>(p.weight) + band * k * k * p.channels + c;
    // rows of the kernel that lie over the border see only zeros
    const int64_t first = i < pad ? pad - i : 0, last = min(k, p.band_height() + pad - i);
    for (int64_t j = 0; j < columns; j += tile) {
      V out[tile];
      for (int64_t x = 0; x < tile; ++x)
        out[x] = V(Acc(0));
      for (int64_t ky = first; ky < last; ++ky)
        for (int64_t kx = 0; kx < k; ++kx) {
          const V w = load(weight + (ky * k + kx) * p.channels, count);
          const V* from = plane + (i + ky) * width + j + kx;
          for (int64_t x = 0; x < tile; ++x)
            out[x] = out[x] + w * from[x];
        }
      for (int64_t x = 0; x < tile; ++x)
        row[band * columns + j + x] = out[x];
    }
  }

  __attribute__((always_inline)) static void write_row(const HaarForward& p, int64_t batch, int64_t i, int64_t c,
                                                       int count, const V* row) {
    const int64_t columns = ceil_div(p.band_width(), tile) * tile, line = p.width * p.output_column;
    T* out = static_cast<T*>(p.output) + (batch * p.height + 2 * i) * line + c;
    const bool below = 2 * i + 1 < p.height;
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
struct HaarBackwardWeightKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;

  static int64_t padded_width(const HaarSizes& p) { return p.band_width() + p.kernel - 1; }

  static size_t scratch_bytes(const HaarBackwardWeight& p) {
    return (padded_width(p) * p.band_height() + p.band_width() + p.kernel * p.kernel) * sizeof(V);
  }

  /// A task sums over the whole batch, in order, for one sub-band of one vector of channels.
  static int64_t tasks(const HaarBackwardWeight& p) { return 4 * ceil_div(p.channels, V::size); }

  static void run(const HaarBackwardWeight& p, int64_t begin, int64_t end, std::byte* scratch) {
    V* input = reinterpret_cast<V*>(scratch);  // (band height, padded width), the border zero
    V* grad_row = input + padded_width(p) * p.band_height();
    V* sums = grad_row + p.band_width();
    for (int64_t i = 0; i < padded_width(p) * p.band_height(); ++i)
      input[i] = V(Acc(0));
    for (int64_t task = begin; task < end; ++task) {
      const int band = static_cast<int>(task % 4);
      const int64_t c = task / 4 * V::size, kernel = p.kernel;
      const int count = static_cast<int>(min(V::size, p.channels - c));
      for (int64_t i = 0; i < kernel * kernel; ++i)
        sums[i] = V(Acc(0));
      for (int64_t batch = 0; batch < p.batch; ++batch)
        switch (kernel) {
          case 3:
            add_sample<3>(p, batch, band, c, count, input, grad_row, sums);
            break;
          case 5:
            add_sample<5>(p, batch, band, c, count, input, grad_row, sums);
            break;
          case 7:
            add_sample<7>(p, batch, band, c, count, input, grad_row, sums);
            break;
          default:
            add_sample<1>(p, batch, band, c, count, input, grad_row, sums);
        }
      Acc* out = static_cast<Acc*>(p.sums) + band * kernel * kernel * p.channels + c;
      for (int64_t i = 0; i < kernel * kernel; ++i)
        store(out + i * p.channels, sums[i], count);
    }
  }

  static V transform(const HaarSizes& p, const Image& image, int64_t batch, int band, int64_t i, int64_t j, int64_t c,
                     int count) {
    const T* data = static_cast<const T*>(image.data) + batch * image.batch + c;
    const Patch<T, V> patch(p, data, image, i, j, count);
    return haar(patch.a, patch.b, patch.c, patch.d).band[band];
  }

  /// `columns` of the kernel at a time: they share each load of the gradient.
  template <int columns>
  static void add_sample(const HaarBackwardWeight& p, int64_t batch, int band, int64_t c, int count, V* input,
                         V* grad_row, V* sums) {
    const int64_t height = p.band_height(), width = p.band_width(), stride = padded_width(p), pad = p.kernel / 2;
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j)
        input[i * stride + j + pad] = transform(p, p.input, batch, band, i, j, c, count);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j)
        grad_row[j] = transform(p, p.grad_output, batch, band, i, j, c, count);
      const int64_t first = i < pad ? pad - i : 0, last = min(p.kernel, height + pad - i);
      for (int64_t ky = first; ky < last; ++ky)
        for (int64_t kx = 0; kx < p.kernel; kx += columns) {
          const V* from = input + (i + ky - pad) * stride + kx;
          V* to = sums + ky * p.kernel + kx;
          V out[columns];
          for (int x = 0; x < columns; ++x)
            out[x] = to[x];
          for (int64_t j = 0; j < width; ++j)
            for (int x = 0; x < columns; ++x)
              out[x] = out[x] + grad_row[j] * from[j + x];
          for (int x = 0; x < columns; ++x)
            to[x] = out[x];
        }
    }
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
