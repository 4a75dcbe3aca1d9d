// Host side of the pointwise convolution that its backends share: checks, outputs, kernel parameters.
#pragma once

#include "kernels/pointwise.h"
#include "mobilemamba.h"

namespace mobilemamba {

struct PointwiseArguments {
  const at::Tensor &input, &weight, &bias;
  const std::optional<at::Tensor>& residual;
  std::string_view activation;

  void check() const;
  /// Uninitialised.
  at::Tensor output() const;
  /// By a matrix product of torch's, for what has no kernel.
  at::Tensor with_matmul() const;
  /// By `kernel`, in float32 or 16 bits.
  at::Tensor with(void (*kernel)(const PointwiseForward&)) const;
};

/// The weight (out_channels, in_channels) of its packed form.
at::Tensor unpack_pointwise_weight(const at::Tensor& packed, int64_t out_channels, int64_t in_channels);

}  // namespace mobilemamba
