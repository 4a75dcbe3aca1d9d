// Shared by the operators that call other differentiable operators and have no kernel: dense convolutions and parts of
// a batch. Their gradients and shapes come from the inner operators.
#pragma once

#include <c10/util/FunctionRef.h>

#include "ops/common.h"

namespace mobilemamba {

/// activation(convolution + bias) for a weight (out, in, k, k), plain or packed (pack_conv2d_weight), with zero padding
/// of k / 2. The activation is "none" or "relu".
at::Tensor dense_conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t kernel_size,
                        int64_t stride, const char* activation);

/// Checks an image that has at least one channel and pixel.
void check_dense_image(const Checks& check, const char* name, const at::Tensor& image);

/// Checks the weight and the bias (out) of dense_conv2d and returns out.
c10::SymInt check_dense_conv2d(const Checks& check, const char* weight_name, const at::Tensor& weight,
                               const char* bias_name, const at::Tensor& bias, const c10::SymInt& in,
                               int64_t kernel_size);

/// layers(input). On the CPU all layers process `images` images before the next ones, so that the activations between
/// the layers stay in the cache. No image may depend on another.
at::Tensor in_parts(const at::Tensor& input, int64_t images, c10::function_ref<at::Tensor(const at::Tensor&)> layers);

}  // namespace mobilemamba
