// Rows of a matrix times a weight; see the header.
#include "cpu/row_product.h"

#include <ATen/ops/zeros.h>

#include "ops/matrix.h"

namespace mobilemamba::cpu {

RowProduct::RowProduct(const at::Tensor& weight, const at::Tensor& bias, int64_t in, int64_t out)
    : in_(in),
      out_(out),
      weight_(packed_matrix(weight)),
      bias_(bias.defined() ? bias.to(at::kFloat).contiguous() : at::zeros({out}, weight.options().dtype(at::kFloat))) {}

PackedConvForward RowProduct::of(int64_t rows, const void* input, int64_t input_row, void* output,
                                 int64_t output_row) const {
  return {
      .dtype = kernel_dtype(weight_.scalar_type()),
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
      .bias = bias_.const_data_ptr(),
      .residual = nullptr,
      .residual_row = 0,
      .output = output,
      .output_row = output_row,
  };
}

}  // namespace mobilemamba::cpu
