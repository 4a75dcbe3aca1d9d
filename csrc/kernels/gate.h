// The gate behind the scan: parameters of its kernels.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/functions.h"

namespace mobilemamba {

/// output = (LayerNorm(y) * weight + bias) * silu(z). LayerNorm is over the channels of a row.
struct GateForward {
  DType dtype;
  int64_t rows, channels;
  double eps;
  const void* y;  // (rows, C) contiguous
  const void* z;
  int64_t z_row;              // elements from row to row
  const void *weight, *bias;  // (C), in the accumulator type
  void* output;               // (rows, C) contiguous
};

/// output = relu(gated @ product_weight + product_bias + output), where gated is the gate's output, rounded to 16 bits.
/// The weight is packed as kernels/packed_conv.h says. Beside it, for the same rows, identity_output = relu(identity).
struct GateProduct {
  GateForward gate;  // in 16 bits, without output
  int64_t out_channels;
  const void *product_weight, *product_bias;  // the bias is float32
  void* output;                               // (rows, out_channels)
  int64_t identity_channels;
  const void* identity;   // (rows, identity_channels)
  int64_t identity_row;   // elements from row to row, like the next one
  void* identity_output;  // (rows, identity_channels)
  int64_t output_row;     // of both outputs
};

template <typename V>
MOBILEMAMBA_HOST_DEVICE V gate(V normalized, V weight, V bias, V z) {
  return (normalized * weight + bias) * (z * sigmoid(z));
}

}  // namespace mobilemamba
