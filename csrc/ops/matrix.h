// Shared by the operators with matrix products: images as matrices with a row for each position, and weights (out, in)
// that may be packed (by pack_conv2d_weight, as kernels of size 1).
#pragma once

#include "ops/common.h"

namespace mobilemamba {

/// A channels-last image (batch, channels, height, width), or a slice of its channels, as (positions, channels).
at::Tensor positions(const at::Tensor& image);

/// The matrix (positions, channels) as images with the batch, height and width of `like`.
at::Tensor image(const at::Tensor& positions, const at::Tensor& like);

/// Checks the shape, device and dtype of a weight (out, in), plain or packed.
void check_matrix(const Checks& check, const char* name, const at::Tensor& weight, const c10::SymInt& out,
                  const c10::SymInt& in);

/// The packed form of a weight (out, in), contiguous.
at::Tensor packed_matrix(const at::Tensor& weight);

/// The plain form of a weight (out, in), contiguous: torch may sum in another order for other strides.
at::Tensor plain_matrix(const at::Tensor& weight, int64_t out, int64_t in);

/// input @ weight.t() + bias by torch, for a matrix (rows, in) and a weight (out, in). An undefined bias is zero.
at::Tensor linear_with_torch(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t out);

/// The gradient of a weight, plain or packed like the weight, from the gradient of its plain form.
at::Tensor matrix_gradient(const at::Tensor& grad, const at::Tensor& weight);

/// The gradient of any other parameter, in the parameter's shape and dtype.
at::Tensor parameter_gradient(const at::Tensor& grad, const at::Tensor& parameter);

}  // namespace mobilemamba
