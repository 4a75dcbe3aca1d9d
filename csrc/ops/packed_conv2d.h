// Host side of the convolution on a packed weight that its backends share: checks, outputs, kernel parameters.
#pragma once

#include "kernels/packed_conv.h"
#include "mobilemamba.h"
#include "ops/common.h"

namespace mobilemamba {

/// The operator's arguments, in the order of its schema.
struct PackedConvArguments {
  at::Tensor input, weight, bias;
  std::optional<at::Tensor> residual;
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

/// The sizes of the packed form of a weight (out, patch), where a patch has in_channels * kernel_size^2 elements.
std::vector<c10::SymInt> packed_sizes(const c10::SymInt& out, const c10::SymInt& patch);

/// The plain weight (out_channels, in_channels, kernel_size, kernel_size) from its packed form.
at::Tensor unpack_conv2d_weight(const at::Tensor& packed, int64_t out_channels, int64_t in_channels,
                                int64_t kernel_size);

/// convolution + bias by torch, for a plain weight (out, in, k, k), with zero padding of k / 2.
at::Tensor conv2d_with_torch(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t stride);

}  // namespace mobilemamba
