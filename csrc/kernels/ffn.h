// The feed-forward layer as one kernel: its parameters.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace mobilemamba {

/// output = input + relu(input @ expand_weight + expand_bias) @ project_weight + project_bias + residual, for matrices
/// (rows, channels) in 16 bits with float32 sums. The hidden activations are rounded to 16 bits, the output once. The
/// weights are packed as kernels/packed_conv.h says.
struct FfnForward {
  DType dtype;
  int64_t rows, channels, hidden;
  const void* input;
  int64_t input_row;                        // elements from row to row, like the next ones
  const void *expand_weight, *expand_bias;  // biases are float32
  const void *project_weight, *project_bias;
  const void* residual;  // null: none
  int64_t residual_row;
  void* output;
  int64_t output_row;
};

}  // namespace mobilemamba
