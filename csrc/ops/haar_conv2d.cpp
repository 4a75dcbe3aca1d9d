// Host side of the Haar convolution; see the header.
#include "ops/haar_conv2d.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>

#include "ops/common.h"

namespace mobilemamba {

at::Tensor haar_conv2d(const at::Tensor& input, const at::Tensor& weight) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mobilemamba::haar_conv2d", "").typed<decltype(haar_conv2d)>();
  return op.call(input, weight);
}

at::Tensor haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mobilemamba::haar_conv2d_backward_weight", "")
                             .typed<decltype(haar_conv2d_backward_weight)>();
  return op.call(grad_output, input, kernel_size);
}

void check_haar_conv2d(const at::Tensor& input, const at::Tensor& weight) {
  const Checks check("haar_conv2d", "input", input);
  check.dimensions("input", input, 4, "(batch, channels, height, width)");
  check.dimensions("weight", weight, 4, "(4 * channels, 1, k, k)");
  const c10::SymInt k = weight.sym_size(3);
  check.shape("weight", weight, {input.sym_size(1) * 4, 1, k, k}, "(4 * channels, 1, k, k)");
  TORCH_SYM_CHECK((k % 2).sym_eq(1), "haar_conv2d: weight has shape ", weight.sym_sizes(),
                  ", expected an odd kernel size k");
  check.parameter("weight", weight);
}

void check_haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size) {
  const Checks check("haar_conv2d_backward_weight", "input", input);
  check.dimensions("input", input, 4, "(batch, channels, height, width)");
  check.shape("grad_output", grad_output, input.sym_sizes(), "(batch, channels, height, width)");
  check.like_main("grad_output", grad_output);
  TORCH_CHECK(kernel_size > 0 && kernel_size % 2 == 1, "haar_conv2d_backward_weight: kernel_size is ", kernel_size,
              ", expected a positive odd number");
}

at::Tensor haar_output(const at::Tensor& input) {
  return at::empty_symint(input.sym_sizes(), input.options(), at::MemoryFormat::ChannelsLast);
}

at::Tensor haar_grad_weight(const at::Tensor& input, int64_t kernel_size) {
  return at::empty_symint({input.sym_size(1) * 4, 1, kernel_size, kernel_size},
                          input.options().dtype(accumulate_type(input.scalar_type())));
}

at::Tensor haar_image(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor haar_packed_weight(const at::Tensor& weight, at::ScalarType input_type) {
  const int64_t channels = weight.size(0) / 4, k = weight.size(3);
  return weight.to(accumulate_type(input_type)).reshape({channels, 4, k, k}).permute({1, 2, 3, 0}).contiguous();
}

namespace {

HaarSizes sizes_of(const at::Tensor& image, int64_t kernel) {
  return {kernel_dtype(image.scalar_type()), image.size(0), image.size(1), image.size(2), image.size(3), kernel};
}

HaarImage image_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(2), x.stride(3)};
}

}  // namespace

HaarForward haar_forward_params(const at::Tensor& image, const at::Tensor& packed_weight, at::Tensor& output) {
  return {sizes_of(image, packed_weight.size(1)), image_of(image), packed_weight.const_data_ptr(),
          output.mutable_data_ptr()};
}

HaarBackwardWeight haar_backward_weight_params(const at::Tensor& grad_image, const at::Tensor& image,
                                               at::Tensor& packed_grad) {
  return {sizes_of(image, packed_grad.size(1)), image_of(grad_image), image_of(image), packed_grad.mutable_data_ptr()};
}

}  // namespace mobilemamba
