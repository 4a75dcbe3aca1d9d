// The host side of the feed-forward layer in training: checks, outputs, the composition of torch's operators.
#pragma once

#include "ops/conv_norm.h"

namespace mobilemamba {

/// What the forward pass keeps: the products before their norms, and the moments of these norms.
struct FfnNormSaved {
  at::Tensor expanded, projected, expand_mean, expand_var, project_mean, project_var;
  explicit FfnNormSaved(at::TensorList list);
};

/// The arguments that forward and backward share.
struct FfnNormArguments {
  at::Tensor input, expand_weight, expand_norm_weight, expand_norm_bias, project_weight, project_norm_weight,
      project_norm_bias;
  double expand_eps, project_eps;

  /// The two convolutions; `hidden` (B, F, H, W) is the first one's output, after its norm and ReLU.
  ConvNormArguments expand() const;
  ConvNormArguments project(const at::Tensor& hidden) const;

  void check() const;
  void check_backward(const at::Tensor& grad_output, const FfnNormSaved& saved) const;
  /// Uninitialised: an image of the hidden width.
  at::Tensor hidden() const;
  FfnNormResult result() const;
  FfnNormGradients gradients() const;
};

/// With the parameters in the order of the members.
FfnNormArguments ffn_norm_arguments(const at::Tensor& input, at::TensorList parameters, double expand_eps,
                                    double project_eps);

/// By torch's operators.
FfnNormResult ffn_norm_composed(const FfnNormArguments& a);
FfnNormGradients ffn_norm_backward_composed(const at::Tensor& grad_output, const FfnNormArguments& a,
                                            const FfnNormSaved& saved);

}  // namespace mobilemamba
