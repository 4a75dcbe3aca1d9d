// Host side of the feed-forward layer that its backends share: checks, outputs, composition.
#pragma once

#include "mobilemamba.h"

namespace mobilemamba {

/// For C channels and a hidden width F. Matrices (out, in) have the input's type and may also be packed
/// (pack_conv2d_weight); biases may be float32 beside it.
struct FfnWeights {
  const at::Tensor &expand_weight, &expand_bias;    // (F, C), (F)
  const at::Tensor &project_weight, &project_bias;  // (C, F), (C)
};

/// The layer on contiguous matrices (rows, channels), a row for each position:
/// output = input + relu(input @ expand_weight.t() + expand_bias) @ project_weight.t() + project_bias + residual.
struct FfnRows {
  const at::Tensor& input;
  const std::optional<at::Tensor>& residual;
  const FfnWeights& weights;
};

struct FfnArguments {
  const at::Tensor& input;
  const FfnWeights weights;

  void check(const std::optional<at::Tensor>& residual) const;
  void check_backward(const at::Tensor& grad_output) const;
  /// Uninitialised.
  at::Tensor output() const;
  FfnGradients gradients() const;
  /// The operator by a backend's function of rows.
  at::Tensor with(at::Tensor (*layer)(const FfnRows&), const std::optional<at::Tensor>& residual) const;
};

/// The layer by torch.
at::Tensor ffn_with_torch(const FfnRows& rows);

/// The gradients, composed of torch's operators.
FfnGradients ffn_backward_composed(const at::Tensor& grad_output, const FfnArguments& arguments);

}  // namespace mobilemamba
