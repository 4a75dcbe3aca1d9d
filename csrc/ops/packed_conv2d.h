// The host side of the convolution on a packed weight, shared by its backends: checks, outputs, kernel parameters.
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
  /// The operator, computed by torch's convolution, where there is no kernel.
  at::Tensor with_torch() const;
  /// The operator, computed by `kernel`, in float32 or 16 bits.
  at::Tensor with(void (*kernel)(const PackedConvForward&)) const;
};

/// Whether a weight is packed by pack_conv2d_weight or by quantize_conv2d_weight, and whether by the latter. Not for
/// plain weights of kernel size 2, which no operator has.
bool is_packed(const at::Tensor& weight);
bool is_quantized(const at::Tensor& weight);

/// Checks a packed or quantized weight with `out` outputs and `patch` = in_channels * kernel_size^2 inputs.
void check_packed(const Checks& check, const char* name, const at::Tensor& weight, const c10::SymInt& out,
                  const c10::SymInt& patch);

/// The plain weight (out_channels, in_channels, kernel_size, kernel_size) from its packed form. It refuses quantized
/// weights.
at::Tensor unpack_conv2d_weight(const at::Tensor& packed, int64_t out_channels, int64_t in_channels,
                                int64_t kernel_size);

/// convolution + bias, computed by torch, for a plain weight (out, in, k, k) and zero padding of k / 2.
at::Tensor conv2d_with_torch(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t stride);

}  // namespace mobilemamba
