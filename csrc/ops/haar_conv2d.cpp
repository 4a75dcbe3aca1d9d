// The host side of the Haar convolution; see the header.
#include "ops/haar_conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zero.h>

#include "ops/common.h"

namespace mobilemamba {

void check_haar_conv2d(const at::Tensor& input, const at::Tensor& weight) {
  const Checks check("haar_conv2d", "input", input);
  check.dimensions("input", input, 4, image_layout);
  check.kernel("weight", weight, input.sym_size(1) * 4, 1, "(4 * channels, 1, k, k)");
}

void check_haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size) {
  const Checks check("haar_conv2d_backward_weight", "input", input);
  check.dimensions("input", input, 4, image_layout);
  check.like_main("grad_output", grad_output, input.sym_sizes(), image_layout);
  check_kernel_size("haar_conv2d_backward_weight", "kernel_size", kernel_size);
  check_sizes("haar_conv2d_backward_weight", "the gradient", {input.sym_size(1) * 4, 1, kernel_size, kernel_size});
}

at::Tensor haar_grad_weight(const at::Tensor& input, int64_t kernel_size) {
  return at::empty_symint({input.sym_size(1) * 4, 1, kernel_size, kernel_size},
                          input.options().dtype(accumulate_type(input.scalar_type())));
}

namespace {

/// The weight (C, 4, k, k) as the kernels read it: (4, k, k, C) in the accumulator type.
at::Tensor channels_last_bands(const at::Tensor& bands, at::ScalarType input_type) {
  return bands.to(accumulate_type(input_type)).permute({1, 2, 3, 0}).contiguous();
}

HaarSizes sizes_of(const at::Tensor& input, int64_t kernel) {
  return {kernel_dtype(input.scalar_type()), input.size(0), input.size(1), input.size(2), input.size(3), kernel};
}

}  // namespace

at::Tensor HaarBackend::haar_conv2d(const at::Tensor& input, const at::Tensor& weight) const {
  check_haar_conv2d(input, weight);
  at::Tensor output = empty_image(input);
  if (output.numel() == 0) return output;
  const int64_t k = weight.size(3);
  haar_conv2d_into(output.mutable_data_ptr(), input.size(1), input, weight.reshape({-1, 4, k, k}));
  return output;
}

void HaarBackend::haar_conv2d_into(void* output, int64_t output_column, const at::Tensor& input,
                                   const at::Tensor& bands) const {
  const at::Tensor image = channels_contiguous(input), weight = channels_last_bands(bands, input.scalar_type());
  forward({sizes_of(image, bands.size(3)), image_of(image), weight.const_data_ptr(), output, output_column});
}

at::Tensor HaarBackend::haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                                    int64_t kernel_size) const {
  check_haar_conv2d_backward_weight(grad_output, input, kernel_size);
  at::Tensor grad_weight = haar_grad_weight(input, kernel_size);
  if (input.numel() == 0) return grad_weight.zero_();
  const at::Tensor grad_image = channels_contiguous(grad_output), image = channels_contiguous(input);
  const HaarSizes sizes = sizes_of(image, kernel_size);
  const int64_t slabs = backward_weight_slabs(sizes), channels = input.size(1);
  at::Tensor sums = at::empty({slabs, 4, kernel_size, kernel_size, channels}, grad_weight.options());
  backward_weight({sizes, slabs, image_of(grad_image), image_of(image), sums.mutable_data_ptr()});
  const at::Tensor sum = slabs == 1 ? sums[0] : sums.sum(0);
  grad_weight.view({channels, 4, kernel_size, kernel_size}).copy_(sum.permute({3, 0, 1, 2}));
  return grad_weight;
}

}  // namespace mobilemamba
