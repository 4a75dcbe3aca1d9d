// The host side of convolution and batch normalisation in training: checks, outputs, the composition of torch's
// operators.
#pragma once

#include "mobilemamba.h"

namespace mobilemamba {

/// The arguments that forward and backward share.
struct ConvNormArguments {
  at::Tensor input, weight, norm_weight, norm_bias;
  int64_t stride;
  std::string_view activation;
  double eps;

  void check(const std::optional<at::Tensor>& residual) const;
  void check_backward(const at::Tensor& grad_output, const at::Tensor& convolved, const at::Tensor& mean,
                      const at::Tensor& var) const;

  bool depthwise() const;  // as many groups as channels; otherwise one group
  bool pointwise() const;  // a matrix product
  bool relu() const { return activation == "relu"; }

  /// Uninitialised: the output, or the convolution's output.
  at::Tensor output() const;
  /// What is kept of the convolution's output for the backward pass: nothing of a depthwise one, which is computed
  /// again.
  at::Tensor kept(const at::Tensor& convolved) const;
  /// Uninitialised: a value for each output channel, in the accumulator type.
  at::Tensor per_channel() const;
  /// Uninitialised.
  ConvNormGradients gradients(bool input_gradient) const;
};

/// By torch's operators.
ConvNormResult conv_norm_composed(const ConvNormArguments& a, const std::optional<at::Tensor>& residual);
ConvNormGradients conv_norm_backward_composed(const at::Tensor& grad_output, const ConvNormArguments& a,
                                              const at::Tensor& convolved, const at::Tensor& mean,
                                              const at::Tensor& var, bool input_gradient);

/// activation(norm(convolved)), in the accumulator type.
at::Tensor conv_norm_output_composed(const ConvNormArguments& a, const at::Tensor& convolved, const at::Tensor& mean,
                                     const at::Tensor& var);

/// The convolution and its gradients by torch.
at::Tensor convolve_with_torch(const ConvNormArguments& a);
/// Without `input_gradient` that gradient is empty.
std::pair<at::Tensor, at::Tensor> convolution_gradients_with_torch(const at::Tensor& grad, const ConvNormArguments& a,
                                                                   bool input_gradient);

}  // namespace mobilemamba
