// The convolution on a packed weight: parameters of its kernels.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/depthwise.h"

namespace mobilemamba {

/// A matrix product of patches and weight. Each position of the output is a row:
/// output = activation(patches @ weight + bias) + residual, or, with `residual_inside`,
/// output = activation(patches @ weight + bias + residual). A second residual is added last. Zero padding of kernel / 2
/// on every side.
///
/// A patch is (kernel, kernel, in_channels). The weight is packed in panels of 32 outputs,
/// (ceil(out_channels / 32), ceil(patch / 2), 32, 2). Two inputs of one output are adjacent, because instructions for
/// 16-bit products take such pairs. 32 outputs fill whole vectors of every width. The padding is zero.
///
/// A quantized weight has 8 bits an element, and the kernel rounds the patches to 8 bits too:
/// q = clamp(round(x / scale) + zero_point, 0, 255), and output = multiplier * (q @ weight - correction) + bias and so
/// on. It is packed as int8 (ceil(out_channels / 32), groups + quantized_facts, 32, 4): four inputs of one output are
/// adjacent, because instructions for 8-bit products take such groups. The rows of facts hold a 4-byte word for each
/// output: its multiplier (float32), which is scale times the weight's own scale; its correction (int32), which is
/// zero_point times the sum of its weights; and in the last row 1 / scale and zero_point (float32) as the first two.
struct PackedConvForward {
  DType dtype;  // of input, residuals and output; and of the weight, unless it is quantized
  int64_t batch, in_channels, height, width, out_channels, kernel, stride;
  Activation activation;  // none or relu
  bool residual_inside;
  Image input;
  const void* weight;
  const void* bias;                       // (N), in the accumulator type; null: none
  const void* residual;                   // null: none
  int64_t residual_row;                   // elements from position to position, like the next two
  const void* second_residual = nullptr;  // null: none
  int64_t second_residual_row = 0;
  void* output;
  int64_t output_row;
  bool quantized = false;

  static constexpr int64_t panel = 32;
  static constexpr int64_t group = 4, quantized_facts = 3, word = 4;  // inputs; rows; bytes
  /// More inputs could overflow the int32 sums of products of 255 by 127.
  static constexpr int64_t most_quantized_inputs = 65536;
  MOBILEMAMBA_HOST_DEVICE int64_t out_height() const { return ceil_div(height, stride); }
  MOBILEMAMBA_HOST_DEVICE int64_t out_width() const { return ceil_div(width, stride); }
  MOBILEMAMBA_HOST_DEVICE int64_t rows() const { return batch * out_height() * out_width(); }
  MOBILEMAMBA_HOST_DEVICE int64_t patch() const { return kernel * kernel * in_channels; }
  MOBILEMAMBA_HOST_DEVICE int64_t panels() const { return ceil_div(out_channels, panel); }
  MOBILEMAMBA_HOST_DEVICE int64_t pairs() const { return ceil_div(patch(), 2); }
  MOBILEMAMBA_HOST_DEVICE int64_t groups() const { return ceil_div(patch(), group); }
  /// Whether the input is the matrix of patches, with rows `input.column` elements apart.
  MOBILEMAMBA_HOST_DEVICE bool in_place() const {
    return kernel == 1 && stride == 1 && (height == 1 || input.row == width * input.column) &&
           (batch == 1 || input.batch == height * width * input.column);
  }
};

}  // namespace mobilemamba
