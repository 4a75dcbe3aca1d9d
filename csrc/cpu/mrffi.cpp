// The MRFFI block on the CPU.
#include "ops/mrffi.h"

#include <torch/library.h>

#include "cpu/backends.h"
#include "cpu/row_product.h"
#include "cpu/run.h"
#include "ops/common.h"

namespace mobilemamba::cpu {
namespace {

void product(const Product& p, at::Tensor output) {
  if (p.input.scalar_type() == at::kDouble) return product_with_torch(p, output);
  const RowProduct product(p.weight, p.bias, p.input.size(1), output.size(1));
  PackedConvForward params = product.of(p.input.size(0), p.input.const_data_ptr(), p.input.stride(0),
                                        output.mutable_data_ptr(), output.stride(0));
  params.activation = p.relu ? Activation::relu : Activation::none;
  params.residual_inside = p.residual_inside;
  if (p.residual) {
    params.residual = p.residual->const_data_ptr();
    params.residual_row = p.residual->stride(0);
  }
  run_packed_conv(params);
}

MrffiBackend backend() {
  return {
      .scan = scan,
      .haar = haar,
      .depthwise = depthwise,
      .gate = [](const GateForward& p) { run(kernels().gate_forward, p); },
      .product = product,
  };
}

at::Tensor forward(const at::Tensor& input, const std::optional<at::Tensor>& residual, at::TensorList weights,
                   double eps) {
  return backend().mrffi({input, weights, eps}, residual);
}

MrffiGradients backward(const at::Tensor& grad_output, const at::Tensor& input, at::TensorList weights, double eps) {
  return mrffi_backward_composed(grad_output, {input, weights, eps});
}

}  // namespace

TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("mrffi", forward);
  m.impl("mrffi_backward", backward);
}

}  // namespace mobilemamba::cpu
