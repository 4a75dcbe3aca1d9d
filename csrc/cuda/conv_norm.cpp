// Convolution and batch normalisation in training on CUDA: torch's operators, which call cuDNN.
#include "ops/conv_norm.h"

#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

ConvNormResult conv_norm_cuda(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& norm_weight,
                              const at::Tensor& norm_bias, const std::optional<at::Tensor>& residual, int64_t stride,
                              std::string_view activation, double eps) {
  const DeviceOf device(input);
  return conv_norm_composed({input, weight, norm_weight, norm_bias, stride, activation, eps}, residual);
}

ConvNormGradients conv_norm_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                          const at::Tensor& weight, const at::Tensor& norm_weight,
                                          const at::Tensor& norm_bias, const at::Tensor& convolved,
                                          const at::Tensor& mean, const at::Tensor& var, int64_t stride,
                                          std::string_view activation, double eps, bool input_gradient) {
  const DeviceOf device(input);
  return conv_norm_backward_composed(grad_output, {input, weight, norm_weight, norm_bias, stride, activation, eps},
                                     convolved, mean, var, input_gradient);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("conv_norm", conv_norm_cuda);
  m.impl("conv_norm_backward", conv_norm_backward_cuda);
}

}  // namespace mobilemamba::cuda
