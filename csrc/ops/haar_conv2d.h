// Host side of the Haar convolution that its backends share: checks, outputs, kernel parameters.
#pragma once

#include "kernels/haar.h"
#include "mobilemamba.h"

namespace mobilemamba {

void check_haar_conv2d(const at::Tensor& input, const at::Tensor& weight);
void check_haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size);

/// Uninitialised results.
at::Tensor haar_output(const at::Tensor& input);
at::Tensor haar_grad_weight(const at::Tensor& input, int64_t kernel_size);

/// A tensor whose channels are contiguous: the same one where it is so already.
at::Tensor haar_image(const at::Tensor& x);

/// The weight as the kernels read it: (4, k, k, C) in the type of sums.
at::Tensor haar_packed_weight(const at::Tensor& weight, at::ScalarType input_type);

HaarForward haar_forward_params(const at::Tensor& image, const at::Tensor& packed_weight, at::Tensor& output);
/// `packed_grad` is (4, k, k, C).
HaarBackwardWeight haar_backward_weight_params(const at::Tensor& grad_image, const at::Tensor& image,
                                               at::Tensor& packed_grad);

}  // namespace mobilemamba
