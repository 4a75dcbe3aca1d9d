// The CUDA kernels of those operators that others are composed of.
#pragma once

#include "ops/bidirectional_scan.h"
#include "ops/depthwise_conv2d.h"
#include "ops/haar_conv2d.h"
#include "ops/product.h"

namespace mobilemamba::cuda {

extern const ScanBackend scan;
extern const HaarBackend haar;
extern const DepthwiseBackend depthwise;

/// Whether products of the type of `input` have kernels on the current device: 16 bits, on compute capability 8.0 and
/// later.
bool has_tensor_cores(const at::Tensor& input);

void product(const Product& p, at::Tensor output);

}  // namespace mobilemamba::cuda
