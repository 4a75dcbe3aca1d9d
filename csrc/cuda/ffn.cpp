// The feed-forward layer on CUDA.
#include "ops/ffn.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/launch_rows.h"
#include "cuda/run.h"
#include "ops/common.h"
#include "ops/kernel_of.h"
#include "ops/packed_conv2d.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

/// On packed weights in 16 bits as one kernel, where that is predicted to be faster than two products.
at::Tensor ffn_of_rows(const FfnRows& rows) {
  const FfnWeights& w = rows.weights;
  const at::Tensor& x = rows.input;
  const Form form = chosen_form();
  if (!has_tensor_cores(x) || w.expand_weight.dim() != 4 || w.project_weight.dim() != 4 || form == Form::products)
    return ffn_of_products(rows, product);
  at::Tensor output = rows.output();
  const at::Tensor expand_weight = w.expand_weight.contiguous(), project_weight = w.project_weight.contiguous();
  const at::Tensor expand_bias = w.expand_bias.to(at::kFloat).contiguous();
  const at::Tensor project_bias = w.project_bias.to(at::kFloat).contiguous();
  const FfnForward p = {
      .dtype = kernel_dtype(x.scalar_type()),
      .rows = x.size(0),
      .channels = x.size(1),
      .hidden = w.expand_bias.size(0),
      .input = x.const_data_ptr(),
      .input_row = x.size(1),
      .expand_weight = expand_weight.const_data_ptr(),
      .expand_bias = expand_bias.const_data_ptr(),
      .project_weight = project_weight.const_data_ptr(),
      .project_bias = project_bias.const_data_ptr(),
      .residual = rows.residual.defined() ? rows.residual.const_data_ptr() : nullptr,
      .residual_row = x.size(1),
      .output = output.mutable_data_ptr(),
      .output_row = x.size(1),
  };
  const FfnLaunch launch = ffn_launch(p, shared_limit(), form == Form::kernel);
  if (!launch.exists()) return ffn_of_products(rows, product);
  check_launch(ffn_forward(p, launch, c10::cuda::getCurrentCUDAStream()));
  return output;
}

at::Tensor ffn_cuda(const FfnArguments& arguments) {
  const DeviceOf device(arguments.input);
  return arguments.with(ffn_of_rows);
}

FfnGradients ffn_backward_cuda(const at::Tensor& grad_output, const FfnArguments& arguments) {
  const DeviceOf device(arguments.input);
  return ffn_backward_composed(grad_output, arguments);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("ffn", kernel_of<ffn, ffn_cuda>);
  m.impl("ffn_backward", kernel_of<ffn_backward, ffn_backward_cuda>);
}

}  // namespace mobilemamba::cuda
