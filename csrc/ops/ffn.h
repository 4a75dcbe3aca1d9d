// The host side of the feed-forward layer, shared by its backends: checks, outputs, composition.
#pragma once

#include "mobilemamba.h"
#include "ops/product.h"

namespace mobilemamba {

/// For C channels and a hidden width F. The matrices have the input's dtype and may be packed (pack_conv2d_weight); the
/// biases may be float32 beside it.
struct FfnWeights {
  at::Tensor expand_weight, expand_bias;    // (F, C), (F)
  at::Tensor project_weight, project_bias;  // (C, F), (C)
};

/// The layer on contiguous matrices (rows, channels) with a row for each position:
/// output = input + relu(input @ expand_weight.t() + expand_bias) @ project_weight.t() + project_bias + residual.
struct FfnRows {
  at::Tensor input, residual;  // no residual: undefined
  FfnWeights weights;

  /// Uninitialised.
  at::Tensor output() const;
};

/// The arguments of ffn; those of ffn_backward are the same without the residual.
struct FfnArguments {
  FfnArguments(const at::Tensor& input, const std::optional<at::Tensor>& residual, const at::Tensor& expand_weight,
               const at::Tensor& expand_bias, const at::Tensor& project_weight, const at::Tensor& project_bias)
      : input(input), residual(residual), weights{expand_weight, expand_bias, project_weight, project_bias} {}
  FfnArguments(const at::Tensor& input, const at::Tensor& expand_weight, const at::Tensor& expand_bias,
               const at::Tensor& project_weight, const at::Tensor& project_bias)
      : FfnArguments(input, std::nullopt, expand_weight, expand_bias, project_weight, project_bias) {}

  at::Tensor input;
  std::optional<at::Tensor> residual;
  FfnWeights weights;

  void check() const;
  void check_backward(const at::Tensor& grad_output) const;
  /// Uninitialised.
  FfnGradients gradients() const;
  /// The operator, computed by a backend's function of rows.
  at::Tensor with(at::Tensor (*layer)(const FfnRows&)) const;
};

/// The layer, as two products.
at::Tensor ffn_of_products(const FfnRows& rows, ProductFunction product);

/// The gradients, composed of torch's operators.
FfnGradients ffn_backward_composed(const at::Tensor& grad_output, const FfnArguments& arguments);

}  // namespace mobilemamba
