// Shapes without data, which may be symbolic. The checks and the memory layout of outputs are those of real backends.
#include "ops/backbone.h"
#include "ops/bidirectional_scan.h"
#include "ops/conv_norm.h"
#include "ops/depthwise_conv2d.h"
#include "ops/ffn.h"
#include "ops/ffn_norm.h"
#include "ops/haar_conv2d.h"
#include "ops/kernel_of.h"
#include "ops/mrffi.h"
#include "ops/packed_conv2d.h"
#include "registration.h"

namespace mobilemamba::meta {
namespace {

at::Tensor scan(const ScanArguments& a) {
  a.check();
  return scan_output(a.u);
}

ScanGradients scan_backward(const at::Tensor& grad_y, const ScanArguments& a) {
  a.check_backward(grad_y);
  return scan_gradients(a);
}

at::Tensor haar(const at::Tensor& input, const at::Tensor& weight) {
  check_haar_conv2d(input, weight);
  return empty_image(input);
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

DepthwiseGradients depthwise_backward(const at::Tensor& grad_output, const DepthwiseArguments& a) {
  a.check_backward(grad_output);
  return a.gradients();
}

ConvNormResult norm(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& norm_weight,
                    const at::Tensor& norm_bias, const std::optional<at::Tensor>& residual, int64_t stride,
                    std::string_view activation, double eps) {
  const ConvNormArguments arguments{input, weight, norm_weight, norm_bias, stride, activation, eps};
  arguments.check(residual);
  return {arguments.output(), arguments.per_channel(), arguments.per_channel(), arguments.kept(arguments.output())};
}

ConvNormGradients norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                const at::Tensor& norm_weight, const at::Tensor& norm_bias, const at::Tensor& convolved,
                                const at::Tensor& mean, const at::Tensor& var, int64_t stride,
                                std::string_view activation, double eps, bool input_gradient) {
  const ConvNormArguments arguments{input, weight, norm_weight, norm_bias, stride, activation, eps};
  arguments.check_backward(grad_output, convolved, mean, var);
  return arguments.gradients(input_gradient);
}

FfnNormResult ffn_of_norms(const FfnNormArguments& a) {
  a.check();
  return a.result();
}

FfnNormGradients ffn_of_norms_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                       at::TensorList parameters, at::TensorList saved, double expand_eps,
                                       double project_eps) {
  const FfnNormArguments arguments = ffn_norm_arguments(input, parameters, expand_eps, project_eps);
  arguments.check_backward(grad_output, FfnNormSaved(saved));
  return arguments.gradients();
}

at::Tensor packed_conv(const PackedConvArguments& a) {
  a.check();
  return a.output();
}

at::Tensor feed_forward(const FfnArguments& a) {
  a.check();
  return empty_image(a.input);
}

FfnGradients feed_forward_backward(const at::Tensor& grad_output, const FfnArguments& a) {
  a.check_backward(grad_output);
  return a.gradients();
}

at::Tensor mixer(const at::Tensor& input, const std::optional<at::Tensor>& residual, at::TensorList weights,
                 double eps) {
  MrffiArguments{input, MrffiWeights(weights), eps}.check(residual);
  return empty_image(input);
}

MrffiGradients mixer_backward(const at::Tensor& grad_output, const at::Tensor& input, at::TensorList weights,
                              double eps) {
  const MrffiArguments arguments{input, MrffiWeights(weights), eps};
  arguments.check_backward(grad_output);
  return arguments.gradients();
}

std::vector<at::Tensor> feature_maps(const BackboneArguments& a) {
  a.check();
  return a.outputs();
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(Meta, m) {
  m.impl("backbone", kernel_of<backbone, feature_maps>);
  m.impl("ffn", kernel_of<ffn, feed_forward>);
  m.impl("ffn_backward", kernel_of<ffn_backward, feed_forward_backward>);
  m.impl("mrffi", mixer);
  m.impl("mrffi_backward", mixer_backward);
  m.impl("bidirectional_scan", kernel_of<bidirectional_scan, scan>);
  m.impl("bidirectional_scan_backward", kernel_of<bidirectional_scan_backward, scan_backward>);
  m.impl("conv_norm", norm);
  m.impl("conv_norm_backward", norm_backward);
  m.impl("ffn_norm", kernel_of<ffn_norm, ffn_of_norms>);
  m.impl("ffn_norm_backward", ffn_of_norms_backward);
  m.impl("haar_conv2d", haar);
  m.impl("haar_conv2d_backward_weight", haar_backward_weight);
  m.impl("packed_conv2d", kernel_of<packed_conv2d, packed_conv>);
  m.impl("depthwise_conv2d", depthwise);
  m.impl("depthwise_conv2d_backward", kernel_of<depthwise_conv2d_backward, depthwise_backward>);
}

}  // namespace mobilemamba::meta
