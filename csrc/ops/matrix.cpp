// Images as matrices and weights that may be packed; see the header.
#include "ops/matrix.h"

#include <ATen/ops/linear.h>

#include "ops/packed_conv2d.h"

namespace mobilemamba {

at::Tensor positions(const at::Tensor& image) {
  return image.permute({0, 2, 3, 1}).flatten(0, 2);
}

at::Tensor image(const at::Tensor& positions, const at::Tensor& like) {
  return positions.view({like.size(0), like.size(2), like.size(3), positions.size(1)}).permute({0, 3, 1, 2});
}

void check_matrix(const Checks& check, const char* name, const at::Tensor& weight, const c10::SymInt& out,
                  const c10::SymInt& in) {
  constexpr int64_t panel = PackedConvForward::panel;
  if (weight.dim() == 4)
    check.shape(name, weight, {(out + (panel - 1)) / panel, (in + 1) / 2, panel, 2}, "as packed");
  else
    check.shape(name, weight, {out, in}, "(out, in)");
  check.like_main(name, weight);
}

at::Tensor matrix_of(const at::Tensor& weight, int64_t out, int64_t in) {
  return weight.dim() == 2 ? weight.contiguous() : unpack_conv2d_weight(weight, out, in, 1).flatten(1);
}

at::Tensor linear_with_torch(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t out) {
  return at::linear(input, matrix_of(weight, out, input.size(1)), bias.defined() ? bias.to(input.scalar_type()) : bias);
}

at::Tensor matrix_gradient(const at::Tensor& grad, const at::Tensor& weight) {
  return weight.dim() == 2 ? grad : pack_conv2d_weight(grad.unsqueeze(2).unsqueeze(3));
}

at::Tensor parameter_gradient(const at::Tensor& grad, const at::Tensor& parameter) {
  return grad.to(parameter.scalar_type()).reshape(parameter.sizes()).contiguous();
}

}  // namespace mobilemamba
