// Shapes without data: the same checks, and outputs laid out as the real backends lay them out. Symbolic sizes pass.
#include "ops/bidirectional_scan.h"
#include "ops/depthwise_conv2d.h"
#include "ops/ffn.h"
#include "ops/haar_conv2d.h"
#include "ops/mrffi.h"
#include "ops/packed_conv2d.h"
#include "registration.h"

namespace mobilemamba::meta {
namespace {

at::Tensor scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log, const at::Tensor& B,
                const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  ScanArguments{u, delta, A_log, B, C, D, dt_weight, dt_bias}.check();
  return scan_output(u);
}

ScanGradients scan_backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& delta,
                            const at::Tensor& A_log, const at::Tensor& B, const at::Tensor& C, const at::Tensor& D,
                            const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  const ScanArguments arguments{u, delta, A_log, B, C, D, dt_weight, dt_bias};
  arguments.check_backward(grad_y);
  return scan_gradients(arguments);
}

at::Tensor haar(const at::Tensor& input, const at::Tensor& weight) {
  check_haar_conv2d(input, weight);
  return haar_output(input);
}

at::Tensor haar_backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size) {
  check_haar_conv2d_backward_weight(grad_output, input, kernel_size);
  return haar_grad_weight(input, kernel_size);
}

at::Tensor depthwise(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& residual, int64_t stride, std::string_view activation) {
  const DepthwiseArguments arguments{input, weight, bias, stride, activation};
  arguments.check(residual);
  return arguments.output();
}

DepthwiseGradients depthwise_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                      const std::optional<at::Tensor>& bias, int64_t stride,
                                      std::string_view activation) {
  const DepthwiseArguments arguments{input, weight, bias, stride, activation};
  arguments.check_backward(grad_output);
  return arguments.gradients();
}

at::Tensor packed_conv(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                       const std::optional<at::Tensor>& residual, int64_t kernel_size, int64_t stride,
                       std::string_view activation) {
  const PackedConvArguments arguments{input, weight, bias, residual, kernel_size, stride, activation};
  arguments.check();
  return arguments.output();
}

at::Tensor feed_forward(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                        const at::Tensor& expand_weight, const at::Tensor& expand_bias,
                        const at::Tensor& project_weight, const at::Tensor& project_bias) {
  const FfnArguments arguments{input, {expand_weight, expand_bias, project_weight, project_bias}};
  arguments.check(residual);
  return arguments.output();
}

FfnGradients feed_forward_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                   const at::Tensor& expand_weight, const at::Tensor& expand_bias,
                                   const at::Tensor& project_weight, const at::Tensor& project_bias) {
  const FfnArguments arguments{input, {expand_weight, expand_bias, project_weight, project_bias}};
  arguments.check_backward(grad_output);
  return arguments.gradients();
}

at::Tensor mixer(const at::Tensor& input, const std::optional<at::Tensor>& residual, at::TensorList weights,
                 double eps) {
  const MrffiArguments arguments{input, weights, eps};
  arguments.check(residual);
  return arguments.output();
}

MrffiGradients mixer_backward(const at::Tensor& grad_output, const at::Tensor& input, at::TensorList weights,
                              double eps) {
  const MrffiArguments arguments{input, weights, eps};
  arguments.check_backward(grad_output);
  return arguments.gradients();
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(Meta, m) {
  m.impl("ffn", feed_forward);
  m.impl("ffn_backward", feed_forward_backward);
  m.impl("mrffi", mixer);
  m.impl("mrffi_backward", mixer_backward);
  m.impl("bidirectional_scan", scan);
  m.impl("bidirectional_scan_backward", scan_backward);
  m.impl("haar_conv2d", haar);
  m.impl("haar_conv2d_backward_weight", haar_backward_weight);
  m.impl("packed_conv2d", packed_conv);
  m.impl("depthwise_conv2d", depthwise);
  m.impl("depthwise_conv2d_backward", depthwise_backward);
}

}  // namespace mobilemamba::meta
