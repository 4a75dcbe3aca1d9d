// The product of a matrix's rows with a weight, by the kernel of the convolution on a packed weight.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels.h"

namespace mobilemamba::cpu {

/// The weight and the bias as the kernel takes them, for inputs in float32 or 16 bits.
class RowProduct {
 public:
  /// `weight` (out, in), plain or packed; an undefined `bias` is zero.
  RowProduct(const at::Tensor& weight, const at::Tensor& bias, int64_t in, int64_t out);

  /// output = input @ weight.t() + bias, for rows at equal distances in elements.
  PackedConvForward of(int64_t rows, const void* input, int64_t input_row, void* output, int64_t output_row) const;

 private:
  int64_t in_, out_;
  at::Tensor weight_, bias_;
};

}  // namespace mobilemamba::cpu
