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

template <typename V>
MOBILEMAMBA_HOST_DEVICE V gate(V normalized, V weight, V bias, V z) {
  return (normalized * weight + bias) * (z * sigmoid(z));
}

}  // namespace mobilemamba
