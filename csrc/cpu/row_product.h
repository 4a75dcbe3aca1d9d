// Multiplies rows of a matrix by a weight, with the kernel of the convolution on a packed weight.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"

namespace mobilemamba::cpu {

/// Holds the weight and the bias in the kernel's form, for inputs in float32 or 16 bits.
class RowProduct {
 public:
  /// `weight` (out, in), plain or packed; an undefined `bias` is zero.
  RowProduct(const at::Tensor& weight, const at::Tensor& bias, int64_t in, int64_t out);

  /// The kernel's parameters for output = input @ weight.t() + bias. Rows are `input_row` and `output_row` elements
  /// apart.
  PackedConvForward of(int64_t rows, const void* input, int64_t input_row, void* output, int64_t output_row) const;

 private:
  int64_t in_, out_;
  at::Tensor weight_, bias_;
};

}  // namespace mobilemamba::cpu
