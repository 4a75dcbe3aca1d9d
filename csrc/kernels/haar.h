// The Haar convolution: parameters of its kernels, and the 2x2 butterfly. Host and device compile this file.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/image.h"

namespace mobilemamba {

struct HaarSizes {
  DType dtype;
  int64_t batch, channels, height, width, kernel;

  MOBILEMAMBA_HOST_DEVICE int64_t band_height() const { return ceil_div(height, 2); }
  MOBILEMAMBA_HOST_DEVICE int64_t band_width() const { return ceil_div(width, 2); }
};

struct HaarForward : HaarSizes {
  Image input;
  const void* weight;     // (4, k, k, C), in the accumulator type
  void* output;           // (B, H, W, C)
  int64_t output_column;  // elements from pixel to pixel
};

/// Gradient of the weight: the sub-bands of the output's gradient are correlated with the sub-bands of the input. Each
/// of `slabs` parts of the positions has a slice of partial sums, and the caller adds the slices in order.
struct HaarBackwardWeight : HaarSizes {
  int64_t slabs;
  Image grad_output, input;
  void* sums;  // (slabs, 4, k, k, C), in the accumulator type
};

template <typename V>
struct HaarBands {
  V band[4];  // LL, LH, HL, HH
};

/// The orthonormal transform of [[a, b], [c, d]]; it is its own inverse.
template <typename V>
MOBILEMAMBA_HOST_DEVICE HaarBands<V> haar(V a, V b, V c, V d) {
  const V half = V(0.5f);
  const V top = a + b, bottom = c + d, top_difference = a - b, bottom_difference = c - d;
  return {{half * (top + bottom), half * (top - bottom), half * (top_difference + bottom_difference),
           half * (top_difference - bottom_difference)}};
}

}  // namespace mobilemamba
