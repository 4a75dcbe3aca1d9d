// What the operators that multiply by matrices share: images as matrices of their positions, and weights (out, in) that
// may also be packed (pack_conv2d_weight, as kernels of size 1).
#pragma once

#include "ops/common.h"

namespace mobilemamba {

/// (batch, channels, height, width), channels contiguous and positions at equal distances, as a matrix of its
/// positions.
at::Tensor positions(const at::Tensor& image);

/// The matrix as images of `like`'s batch and size.
at::Tensor image(const at::Tensor& positions, const at::Tensor& like);

/// Of a weight (out, in): its shape, plain or packed, and that it is like the main argument.
void check_matrix(const Checks& check, const char* name, const at::Tensor& weight, const c10::SymInt& out,
                  const c10::SymInt& in);

/// The plain form of a weight (out, in), contiguous: torch's product may sum in another order where it is not.
at::Tensor matrix_of(const at::Tensor& weight, int64_t out, int64_t in);

/// input @ weight.t() + bias by torch, for a matrix (rows, in) and a weight (out, in). An undefined bias is none.
at::Tensor linear_with_torch(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t out);

/// The gradient of a weight, in its form and type, from that of its plain form.
at::Tensor matrix_gradient(const at::Tensor& grad, const at::Tensor& weight);

/// The gradient of any other parameter, in its shape and type.
at::Tensor parameter_gradient(const at::Tensor& grad, const at::Tensor& parameter);

}  // namespace mobilemamba
