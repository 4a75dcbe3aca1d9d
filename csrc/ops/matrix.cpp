// Images as matrices, and weights that may be packed; see the header.
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
  if (weight.dim() == 4)
    check_packed(check, name, weight, out, in);
  else
    check.like_main(name, weight, {out, in}, "(out, in)");
}

at::Tensor packed_matrix(const at::Tensor& weight) {
  return weight.dim() == 4 ? weight.contiguous() : pack_conv2d_weight(weight.unsqueeze(2).unsqueeze(3));
}

at::Tensor plain_matrix(const at::Tensor& weight, int64_t out, int64_t in) {
  return weight.dim() == 2 ? weight.contiguous() : unpack_conv2d_weight(weight, out, in, 1).flatten(1);
}

at::Tensor linear_with_torch(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t out) {
  return at::linear(input, plain_matrix(weight, out, input.size(1)),
                    bias.defined() ? bias.to(input.scalar_type()) : bias);
}

at::Tensor matrix_gradient(const at::Tensor& grad, const at::Tensor& weight) {
  return weight.dim() == 2 ? grad : packed_matrix(grad);
}

at::Tensor parameter_gradient(const at::Tensor& grad, const at::Tensor& parameter) {
  return grad.to(parameter.scalar_type()).reshape(parameter.sizes()).contiguous();
}

}  // namespace mobilemamba
