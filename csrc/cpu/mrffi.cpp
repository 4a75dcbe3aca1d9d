// The MRFFI block on the CPU.
#include "ops/mrffi.h"

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/backends.h"
#include "cpu/run.h"
#include "ops/common.h"
#include "ops/packed_conv2d.h"

namespace mobilemamba::cpu {
namespace {

void product(const Product& p, at::Tensor output) {
  if (p.input.scalar_type() == at::kDouble) return product_with_torch(p, output);
  const at::Tensor packed =
      p.weight.dim() == 4 ? p.weight.contiguous() : pack_conv2d_weight(p.weight.unsqueeze(2).unsqueeze(3));
  const at::Tensor bias = p.bias.defined() ? p.bias.to(at::kFloat).contiguous()
                                           : at::zeros({output.size(1)}, output.options().dtype(at::kFloat));
  const int64_t rows = p.input.size(0), row = p.input.stride(0);
  run_packed_conv({
      .dtype = kernel_dtype(p.input.scalar_type()),
      .batch = 1,
      .in_channels = p.input.size(1),
      .height = 1,
      .width = rows,
      .out_channels = output.size(1),
      .kernel = 1,
      .stride = 1,
      .activation = p.relu ? Activation::relu : Activation::none,
      .residual_inside = p.residual_inside,
      .input = {p.input.const_data_ptr(), rows * row, rows * row, row},
      .weight = packed.const_data_ptr(),
      .bias = bias.const_data_ptr(),
      .residual = p.residual ? p.residual->const_data_ptr() : nullptr,
      .residual_row = p.residual ? p.residual->stride(0) : 0,
      .output = output.mutable_data_ptr(),
      .output_row = output.stride(0),
  });
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
