// The host side of the Haar convolution, shared by its backends: checks, outputs, kernel parameters.
#pragma once

#include "kernels/haar.h"
#include "mobilemamba.h"

namespace mobilemamba {

void check_haar_conv2d(const at::Tensor& input, const at::Tensor& weight);
void check_haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size);

/// Uninitialised.
at::Tensor haar_grad_weight(const at::Tensor& input, int64_t kernel_size);

/// The operators on a backend's kernels.
struct HaarBackend {
  void (*forward)(const HaarForward&);
  int64_t (*backward_weight_slabs)(const HaarSizes&);
  void (*backward_weight)(const HaarBackwardWeight&);

  at::Tensor haar_conv2d(const at::Tensor& input, const at::Tensor& weight) const;
  /// The same for a weight (C, 4, k, k). Writes to `output`, whose positions are `output_column` elements apart.
  void haar_conv2d_into(void* output, int64_t output_column, const at::Tensor& input, const at::Tensor& bands) const;
  at::Tensor haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                         int64_t kernel_size) const;
};

}  // namespace mobilemamba
