// CPU kernels of batch normalisation. A vector holds neighbouring channels of one row. A task is a block of rows.
#pragma once

#include "cpu/vec.h"
#include "kernels/norm.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// Calls f(channel, count) for each vector of channels.
template <int lanes, typename F>
MOBILEMAMBA_HOST_DEVICE void for_channels(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes)
    f(c, lanes);
  if (c < channels) f(c, static_cast<int>(channels - c));
}

/// The rows of block `block`.
struct NormBlock {
  int64_t first, last;
  NormBlock(const NormSizes& p, int64_t block)
      : first(block * NormSizes::block_rows), last(min(first + NormSizes::block_rows, p.rows)) {}
};

/// Calls f.operator()<n>(row) for the rows of a block, four at a time while there are four: each load and store of a
/// sum then serves four rows.
template <typename F>
MOBILEMAMBA_HOST_DEVICE void for_rows(NormBlock rows, F f) {
  int64_t row = rows.first;
  for (; row + 4 <= rows.last; row += 4)
    f.template operator()<4>(row);
  for (; row < rows.last; ++row)
    f.template operator()<1>(row);
}

template <typename T>
struct NormKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;

  static int64_t tasks(const NormSizes& p) { return p.blocks(); }
  static size_t scratch_bytes(const NormSizes&) { return 0; }
  static const T* row_of(const Rows& rows, int64_t row) { return static_cast<const T*>(rows.data) + row * rows.row; }
  /// The gradient g of one vector.
  template <bool relu>
  MOBILEMAMBA_HOST_DEVICE static V gradient(V grad_output, V input, V scale, V shift) {
    return relu ? select(V(Acc(0)) < input * scale + shift, grad_output, V(Acc(0))) : grad_output;
  }
};

template <typename T>
struct NormStatisticsKernel : NormKernel<T> {
  using typename NormKernel<T>::Acc;
  using typename NormKernel<T>::V;
  using NormKernel<T>::row_of;

  /// The differences from the block's first row are summed, which are of the order of the standard deviation: the
  /// variance does not cancel where the mean is far from zero.
  static void run(const NormStatistics& p, int64_t begin, int64_t end, std::byte*) {
    const int64_t channels = p.channels;
    for (int64_t block = begin; block < end; ++block) {
      const NormBlock rows(p, block);
      Acc* const sums = static_cast<Acc*>(p.moments) + block * 2 * channels;
      Acc* const squares = sums + channels;
      const T* const origin = row_of(p.input, rows.first);
      for (int64_t c = 0; c < 2 * channels; ++c)
        sums[c] = Acc(0);
      for_rows(rows, [&]<int n>(int64_t row) __attribute__((always_inline)) {
        const T* from[n];
        for (int i = 0; i < n; ++i)
          from[i] = row_of(p.input, row + i);
        for_channels<V::size>(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
          const V zero = load(origin + c, count);
          V sum = load(sums + c, count), square = load(squares + c, count);
          for (int i = 0; i < n; ++i) {
            const V x = load(from[i] + c, count) - zero;
            sum = sum + x;
            square = square + x * x;
          }
          store(sums + c, sum, count);
          store(squares + c, square, count);
        });
      });
      const V inverse = V(Acc(1) / static_cast<Acc>(rows.last - rows.first));
      for_channels<V::size>(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        const V sum = load(sums + c, count), mean = sum * inverse;
        store(squares + c, max(load(squares + c, count) - sum * mean, V(Acc(0))), count);
        store(sums + c, load(origin + c, count) + mean, count);
      });
    }
  }
};

template <typename T>
struct NormForwardKernel : NormKernel<T> {
  using typename NormKernel<T>::Acc;
  using typename NormKernel<T>::V;
  using NormKernel<T>::row_of;

  static void run(const NormForward& p, int64_t begin, int64_t end, std::byte*) {
    const bool relu = p.activation == Activation::relu;
    if (p.residual.data)
      relu ? run_as<true, true>(p, begin, end) : run_as<false, true>(p, begin, end);
    else
      relu ? run_as<true, false>(p, begin, end) : run_as<false, false>(p, begin, end);
  }

  template <bool relu, bool residual>
  static void run_as(const NormForward& p, int64_t begin, int64_t end) {
    const Acc *scale = static_cast<const Acc*>(p.scale), *shift = static_cast<const Acc*>(p.shift);
    const int64_t channels = p.channels, last = NormBlock(p, end - 1).last;
    for (int64_t row = NormBlock(p, begin).first; row < last; ++row) {
      const T *from = row_of(p.input, row), *add = residual ? row_of(p.residual, row) : nullptr;
      T* to = static_cast<T*>(p.output) + row * channels;
      for_channels<V::size>(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        V x = load(from + c, count) * load(scale + c, count) + load(shift + c, count);
        if (relu) x = max(x, V(Acc(0)));
        if (residual) x = x + load(add + c, count);
        store(to + c, x, count);
      });
    }
  }
};

template <typename T>
struct NormBackwardSumsKernel : NormKernel<T> {
  using typename NormKernel<T>::Acc;
  using typename NormKernel<T>::V;
  using NormKernel<T>::row_of;

  static void run(const NormBackwardSums& p, int64_t begin, int64_t end, std::byte*) {
    p.activation == Activation::relu ? run_as<true>(p, begin, end) : run_as<false>(p, begin, end);
  }

  template <bool relu>
  static void run_as(const NormBackwardSums& p, int64_t begin, int64_t end) {
    const Acc *scale = static_cast<const Acc*>(p.scale), *shift = static_cast<const Acc*>(p.shift);
    const Acc* mean = static_cast<const Acc*>(p.mean);
    const int64_t channels = p.channels;
    for (int64_t block = begin; block < end; ++block) {
      const NormBlock rows(p, block);
      Acc* const sums = static_cast<Acc*>(p.sums) + block * 2 * channels;
      Acc* const products = sums + channels;
      for (int64_t c = 0; c < 2 * channels; ++c)
        sums[c] = Acc(0);
      for_rows(rows, [&]<int n>(int64_t row) __attribute__((always_inline)) {
        const T *from[n], *grad[n];
        for (int i = 0; i < n; ++i) {
          from[i] = row_of(p.input, row + i);
          grad[i] = row_of(p.grad_output, row + i);
        }
        for_channels<V::size>(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
          const V scale_c = load(scale + c, count), shift_c = load(shift + c, count), mean_c = load(mean + c, count);
          V sum = load(sums + c, count), product = load(products + c, count);
          for (int i = 0; i < n; ++i) {
            const V x = load(from[i] + c, count);
            const V g = NormKernel<T>::template gradient<relu>(load(grad[i] + c, count), x, scale_c, shift_c);
            sum = sum + g;
            product = product + g * (x - mean_c);
          }
          store(sums + c, sum, count);
          store(products + c, product, count);
        });
      });
    }
  }
};

template <typename T>
struct NormBackwardInputKernel : NormKernel<T> {
  using typename NormKernel<T>::Acc;
  using typename NormKernel<T>::V;
  using NormKernel<T>::row_of;

  static void run(const NormBackwardInput& p, int64_t begin, int64_t end, std::byte*) {
    p.activation == Activation::relu ? run_as<true>(p, begin, end) : run_as<false>(p, begin, end);
  }

  template <bool relu>
  static void run_as(const NormBackwardInput& p, int64_t begin, int64_t end) {
    const Acc *scale = static_cast<const Acc*>(p.scale), *shift = static_cast<const Acc*>(p.shift);
    const Acc *mean = static_cast<const Acc*>(p.mean), *slope = static_cast<const Acc*>(p.slope);
    const Acc* offset = static_cast<const Acc*>(p.offset);
    const int64_t channels = p.channels, last = NormBlock(p, end - 1).last;
    for (int64_t row = NormBlock(p, begin).first; row < last; ++row) {
      const T *from = row_of(p.input, row), *grad = row_of(p.grad_output, row);
      T* to = static_cast<T*>(p.grad_input) + row * channels;
      for_channels<V::size>(channels, [&](int64_t c, int count) __attribute__((always_inline)) {
        const V x = load(from + c, count), scale_c = load(scale + c, count);
        const V g = NormKernel<T>::template gradient<relu>(load(grad + c, count), x, scale_c, load(shift + c, count));
        const V y = scale_c * g + load(slope + c, count) * (x - load(mean + c, count)) + load(offset + c, count);
        store(to + c, y, count);
      });
    }
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
