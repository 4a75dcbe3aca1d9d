// The pointwise (1x1) convolution: parameters of its kernels.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/depthwise.h"

namespace mobilemamba {

/// output = activation(input @ weight + bias) + residual, a row for each position.
///
/// The weight is packed in panels of 32 outputs, (ceil(N / 32), ceil(K / 2), 32, 2): two inputs of one output lie
/// together, as instructions for 16-bit products want them, and those of 32 outputs fill whole vectors of any width.
/// Missing inputs and outputs are zero.
struct PointwiseForward {
  DType dtype;
  int64_t rows, in_channels, out_channels;
  Activation activation;  // none or relu
  const void* input;
  int64_t input_row;  // elements from row to row, as below
  const void* weight;
  const void* bias;      // (N), in the type of sums
  const void* residual;  // null: none
  int64_t residual_row;
  void* output;
  int64_t output_row;

  static constexpr int64_t panel = 32;
  int64_t panels() const { return (out_channels + panel - 1) / panel; }
  int64_t pairs() const { return (in_channels + 1) / 2; }
};

}  // namespace mobilemamba
