// The feed-forward layer on CUDA. Its matrix products are torch's.
#include "ops/ffn.h"

#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

at::Tensor forward(const at::Tensor& input, const std::optional<at::Tensor>& residual, const at::Tensor& expand_weight,
                   const at::Tensor& expand_bias, const at::Tensor& project_weight, const at::Tensor& project_bias) {
  const DeviceOf device(input);
  return FfnArguments{input, {expand_weight, expand_bias, project_weight, project_bias}}.with(ffn_with_torch, residual);
}

FfnGradients backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& expand_weight,
                      const at::Tensor& expand_bias, const at::Tensor& project_weight, const at::Tensor& project_bias) {
  const DeviceOf device(input);
  return ffn_backward_composed(grad_output, {input, {expand_weight, expand_bias, project_weight, project_bias}});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("ffn", forward);
  m.impl("ffn_backward", backward);
}

}  // namespace mobilemamba::cuda
