// Matrix products with all that follows them, shared by the operators that are composed of products and by the
// backends.
#pragma once

#include "kernels/packed_conv.h"
#include "mobilemamba.h"

namespace mobilemamba {

/// relu(input @ weight.t() + bias) + residual + second_residual or, with `residual_inside`,
/// relu(input @ weight.t() + bias + residual) + second_residual. Without `relu` its place has no function.
/// The matrices (rows, channels) have contiguous channels. The weight (out, in) may be packed or quantized. Bias and
/// residuals may be undefined.
struct Product {
  at::Tensor input, weight, bias = {}, residual = {}, second_residual = {};
  bool residual_inside = false, relu = false;
};

/// Computes a product. `output` may be the same memory as the residual.
using ProductFunction = void (*)(const Product&, at::Tensor output);

/// By torch's operators.
void product_with_torch(const Product& p, at::Tensor output);

/// By a kernel of the convolution on a packed weight, for float32 or 16 bits.
void product_with_kernel(const Product& p, const at::Tensor& output, void (*kernel)(const PackedConvForward&));

/// Holds the weight and the bias of a product in the kernel's form, for inputs in float32 or 16 bits.
class RowProduct {
 public:
  /// `weight` (out, in), plain, packed or quantized; an undefined `bias` is zero; `type` is that of the input.
  RowProduct(const at::Tensor& weight, const at::Tensor& bias, int64_t in, int64_t out, at::ScalarType type);

  /// The kernel's parameters for output = input @ weight.t() + bias. Rows are `input_row` and `output_row` elements
  /// apart.
  PackedConvForward of(int64_t rows, const void* input, int64_t input_row, void* output, int64_t output_row) const;

 private:
  int64_t in_, out_;
  at::ScalarType type_;
  at::Tensor weight_, bias_;
};

}  // namespace mobilemamba
