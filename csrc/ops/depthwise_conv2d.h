// The host side of the depthwise convolution, shared by its backends: checks, outputs, kernel parameters.
#pragma once

#include "kernels/depthwise.h"
#include "mobilemamba.h"

namespace mobilemamba {

using DepthwiseGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// The arguments that forward and backward share.
struct DepthwiseArguments {
  at::Tensor input, weight;
  std::optional<at::Tensor> bias;
  int64_t stride;
  std::string_view activation;

  void check(const std::optional<at::Tensor>& residual) const;
  void check_backward(const at::Tensor& grad_output) const;

  /// Uninitialised results.
  at::Tensor output() const;
  DepthwiseGradients gradients() const;
};

/// A weight (C, 1, k, k) as the kernels read it: (k, k, C) in `type`.
at::Tensor channels_last_weight(const at::Tensor& weight, at::ScalarType type);

/// The operators on a backend's kernels.
struct DepthwiseBackend {
  void (*forward)(const DepthwiseForward&);
  void (*backward_input)(const DepthwiseBackwardInput&);
  int64_t (*backward_weight_slabs)(const DepthwiseSizes&);
  void (*backward_weight)(const DepthwiseBackwardWeight&);

  at::Tensor depthwise_conv2d(const DepthwiseArguments& arguments, const std::optional<at::Tensor>& residual) const;
  /// Writes relu(scale * activation(convolution + bias) + shift) to `output`. Its positions are `output_column`
  /// elements apart.
  void depthwise_conv2d_into(void* output, int64_t output_column, const DepthwiseArguments& arguments,
                             const at::Tensor& scale, const at::Tensor& shift) const;
  DepthwiseGradients depthwise_conv2d_backward(const at::Tensor& grad_output,
                                               const DepthwiseArguments& arguments) const;
};

}  // namespace mobilemamba
