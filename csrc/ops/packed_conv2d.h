// Host side of the convolution on a packed weight that its backends share: checks, outputs, kernel parameters.
#pragma once

#include "kernels/packed_conv.h"
#include "mobilemamba.h"

namespace mobilemamba {

struct PackedConvArguments {
  const at::Tensor &input, &weight, &bias;
  const std::optional<at::Tensor>& residual;
  int64_t kernel_size, stride;
  std::string_view activation;

  void check() const;
  /// Uninitialised.
  at::Tensor output() const;
  /// By torch's own convolution, for what has no kernel.
  at::Tensor with_torch() const;
  /// By `kernel`, in float32 or 16 bits.
  at::Tensor with(void (*kernel)(const PackedConvForward&)) const;
};

/// The weight (out_channels, in_channels, kernel_size, kernel_size) of its packed form.
at::Tensor unpack_conv2d_weight(const at::Tensor& packed, int64_t out_channels, int64_t in_channels,
                                int64_t kernel_size);

}  // namespace mobilemamba
