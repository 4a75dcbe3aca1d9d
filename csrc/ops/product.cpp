// Matrix products with all that follows them; see the header.
#include "ops/product.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "ops/common.h"
#include "ops/matrix.h"
#include "ops/packed_conv2d.h"

namespace mobilemamba {

void product_with_torch(const Product& p, at::Tensor output) {
  const at::Tensor weight = plain_matrix(p.weight, output.size(1), p.input.size(1)).t();
  const bool in_place = !p.residual.defined() || !p.residual.is_alias_of(output);  // nothing there is still needed
  at::Tensor y = in_place ? output : at::empty(output.sizes(), output.options());
  if (p.bias.defined())
    at::addmm_out(y, p.bias.to(p.input.scalar_type()), p.input, weight);
  else
    at::mm_out(y, p.input, weight);
  if (p.residual.defined() && p.residual_inside) y.add_(p.residual);
  if (p.relu) y.relu_();
  if (p.residual.defined() && !p.residual_inside) y.add_(p.residual);
  if (p.second_residual.defined()) y.add_(p.second_residual);
  if (!in_place) output.copy_(y);
}

void product_with_kernel(const Product& p, const at::Tensor& output, void (*kernel)(const PackedConvForward&)) {
  const RowProduct product(p.weight, p.bias, p.input.size(1), output.size(1), p.input.scalar_type());
  PackedConvForward params = product.of(p.input.size(0), p.input.const_data_ptr(), p.input.stride(0),
                                        output.mutable_data_ptr(), output.stride(0));
  params.activation = p.relu ? Activation::relu : Activation::none;
  params.residual_inside = p.residual_inside;
  if (p.residual.defined()) {
    params.residual = p.residual.const_data_ptr();
    params.residual_row = p.residual.stride(0);
  }
  if (p.second_residual.defined()) {
    params.second_residual = p.second_residual.const_data_ptr();
    params.second_residual_row = p.second_residual.stride(0);
  }
  kernel(params);
}

RowProduct::RowProduct(const at::Tensor& weight, const at::Tensor& bias, int64_t in, int64_t out, at::ScalarType type)
    : in_(in),
      out_(out),
      type_(type),
      weight_(packed_matrix(weight)),
      bias_(bias.defined() ? bias.to(at::kFloat).contiguous() : bias) {}

PackedConvForward RowProduct::of(int64_t rows, const void* input, int64_t input_row, void* output,
                                 int64_t output_row) const {
  return {
      .dtype = kernel_dtype(type_),
      .batch = 1,
      .in_channels = in_,
      .height = 1,
      .width = rows,
      .out_channels = out_,
      .kernel = 1,
      .stride = 1,
      .activation = Activation::none,
      .residual_inside = false,
      .input = {input, rows * input_row, rows * input_row, input_row},
      .weight = weight_.const_data_ptr(),
      .bias = bias_.defined() ? bias_.const_data_ptr() : nullptr,
      .residual = nullptr,
      .residual_row = 0,
      .output = output,
      .output_row = output_row,
      .quantized = is_quantized(weight_),
  };
}

}  // namespace mobilemamba
