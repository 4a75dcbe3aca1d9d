// Batch normalisation in training: parameters of its kernels. The positions of all images are the rows of a matrix.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/depthwise.h"

namespace mobilemamba {

/// Rows of a matrix in the element type, `row` elements apart, channels contiguous.
struct Rows {
  const void* data;
  int64_t row;
};

struct NormSizes {
  DType dtype;
  int64_t rows, channels;

  /// Rows whose sums are accumulated in the accumulator type. The caller adds the sums of the blocks in their order, so
  /// the result depends neither on the number of threads nor on their timing.
  static constexpr int64_t block_rows = 128;
  MOBILEMAMBA_HOST_DEVICE int64_t blocks() const { return ceil_div(rows, block_rows); }
};

struct NormStatistics : NormSizes {
  Rows input;
  void* moments;  // (blocks, 2, C), in the accumulator type: mean, and sum of the squared differences from it
};

/// output = activation(input * scale + shift) + residual. Parameters are (C), in the accumulator type.
struct NormForward : NormSizes {
  Activation activation;  // none or relu
  Rows input;
  const void *scale, *shift;
  Rows residual;  // data is null without it
  void* output;   // contiguous
};

/// g is the gradient of input * scale + shift: grad_output * activation'(input * scale + shift).
struct NormBackward : NormSizes {
  Activation activation;
  Rows input, grad_output;
  const void *scale, *shift, *mean;
};

struct NormBackwardSums : NormBackward {
  void* sums;  // (blocks, 2, C), in the accumulator type: of g, and of g * (input - mean)
};

/// grad_input = scale * g + slope * (input - mean) + offset.
struct NormBackwardInput : NormBackward {
  const void *slope, *offset;
  void* grad_input;  // contiguous
};

}  // namespace mobilemamba
