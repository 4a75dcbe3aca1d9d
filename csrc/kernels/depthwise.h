// The depthwise convolution: parameters of its kernels, and the arithmetic of its epilogue. Host and device compile
// this file; V is a scalar or a vector of channels.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/functions.h"
#include "kernels/image.h"

namespace mobilemamba {

enum class Activation { none, relu, silu };

/// Zero padding of kernel / 2 on every side, so that stride 1 keeps the size.
struct DepthwiseSizes {
  DType dtype;
  int64_t batch, channels, height, width, kernel, stride;

  MOBILEMAMBA_HOST_DEVICE int64_t out_height() const { return ceil_div(height, stride); }
  MOBILEMAMBA_HOST_DEVICE int64_t out_width() const { return ceil_div(width, stride); }
};

/// Without `grad_output`: output = y = activation(convolution + bias) + residual, or relu(scale * y + shift).
/// With `grad_output`: output = grad_output * activation'(convolution + bias), the gradient of the activation's input.
struct DepthwiseForward : DepthwiseSizes {
  Activation activation;
  Image input;
  const void* weight;           // (k, k, C), in the accumulator type like the bias
  const void* bias;             // (C), or null
  Image residual, grad_output;  // of the output's size; data is null without them
  const void *scale, *shift;    // (C), in the accumulator type; both or neither
  void* output;                 // (B, H', W', C)
  int64_t output_column;        // elements from position to position
};

struct DepthwiseBackwardInput : DepthwiseSizes {
  Image grad_output;   // (B, H', W', C)
  const void* weight;  // (k, k, C), in the accumulator type
  void* grad_input;    // (B, H, W, C) contiguous
};

/// Partial sums over the positions: each of `slabs` parts of the batch and its rows has a slice of its own, and the
/// caller adds the slices in order. So the result depends neither on the number of threads nor on their timing.
struct DepthwiseBackwardWeight : DepthwiseSizes {
  int64_t slabs;
  Image grad_output, input;
  void* sums;  // (slabs, k * k + 1, C) in the accumulator type: gradients of the weight, and of the bias last
};

template <typename V>
MOBILEMAMBA_HOST_DEVICE V activate(Activation activation, V x) {
  switch (activation) {
    case Activation::relu:
      return max(x, V(0));  // this order keeps a NaN
    case Activation::silu:
      return x * sigmoid(x);
    default:
      return x;
  }
}

/// d activate / dx.
template <typename V>
MOBILEMAMBA_HOST_DEVICE V activate_derivative(Activation activation, V x) {
  switch (activation) {
    case Activation::relu:
      return select(V(0) < x, V(1), V(0));
    case Activation::silu: {
      const V s = sigmoid(x);
      return s * (V(1) + x * (V(1) - s));
    }
    default:
      return V(1);
  }
}

}  // namespace mobilemamba
