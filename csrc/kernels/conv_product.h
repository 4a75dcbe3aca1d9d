// The depthwise convolution before the scan and the product that follows it, as one kernel: its parameters.
#pragma once

#include <cstdint>

#include "kernels/common.h"

namespace mobilemamba {

/// activated = silu(depthwise convolution of the input + conv_bias), with a kernel of 3 x 3 and zero padding;
/// output = activated @ product_weight. In 16 bits with float32 sums. The weight is packed as kernels/packed_conv.h
/// says.
struct ConvProduct {
  DType dtype;
  int64_t batch, height, width, channels;
  const void* input;                    // (batch * height * width, C)
  int64_t input_row;                    // elements from row to row
  const void *conv_weight, *conv_bias;  // (3, 3, C) and (C), float32
  void* activated;                      // (batch * height * width, C) contiguous
  int64_t out_channels;
  const void* product_weight;
  void* output;  // (batch * height * width, out_channels) contiguous

  MOBILEMAMBA_HOST_DEVICE int64_t rows() const { return batch * height * width; }
};

}  // namespace mobilemamba
