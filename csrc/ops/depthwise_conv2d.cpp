// The host side of the depthwise convolution; see the header.
#include "ops/depthwise_conv2d.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zero.h>

#include <algorithm>

#include "ops/common.h"

namespace mobilemamba {

namespace {

constexpr const char* output_layout = "(batch, channels, ceil(height / stride), ceil(width / stride))";

Activation activation_of(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  TORCH_CHECK(false, "depthwise_conv2d: activation is \"", name, "\", expected \"none\", \"relu\" or \"silu\"");
}

std::vector<c10::SymInt> output_sizes(const at::Tensor& input, int64_t stride) {
  const auto strided = [&](int64_t dim) { return ceil_div(input.sym_size(dim), stride); };
  return {input.sym_size(0), input.sym_size(1), strided(2), strided(3)};
}

}  // namespace

void DepthwiseArguments::check(const std::optional<at::Tensor>& residual) const {
  const Checks check("depthwise_conv2d", "input", input);
  check.dimensions("input", input, 4, image_layout);
  const c10::SymInt channels = input.sym_size(1);
  check.kernel("weight", weight, channels, 1, "(channels, 1, k, k)");
  if (bias) check.parameter("bias", *bias, {channels}, "(channels)");
  check_stride("depthwise_conv2d", "stride", stride);
  if (residual) check.like_main("residual", *residual, output_sizes(input, stride), output_layout);
  activation_of(activation);
}

void DepthwiseArguments::check_backward(const at::Tensor& grad_output) const {
  check(std::nullopt);
  const Checks check("depthwise_conv2d_backward", "input", input);
  check.like_main("grad_output", grad_output, output_sizes(input, stride), output_layout);
}

at::Tensor DepthwiseArguments::output() const {
  return at::empty_symint(output_sizes(input, stride), input.options(), at::MemoryFormat::ChannelsLast);
}

DepthwiseGradients DepthwiseArguments::gradients() const {
  const auto sums = input.options().dtype(accumulate_type(input.scalar_type()));
  return {empty_image(input), at::empty_symint(weight.sym_sizes(), sums), at::empty_symint({input.sym_size(1)}, sums)};
}

at::Tensor channels_last_weight(const at::Tensor& weight, at::ScalarType type) {
  return weight.to(type).select(1, 0).permute({1, 2, 0}).contiguous();
}

namespace {

/// Sizes and tensors in the kernels' layouts.
struct DepthwiseInputs {
  Activation activation;
  at::Tensor image, weight, bias;  // no bias: undefined
  DepthwiseSizes sizes;

  explicit DepthwiseInputs(const DepthwiseArguments& a)
      : activation(activation_of(a.activation)), image(channels_contiguous(a.input)) {
    const at::ScalarType type = accumulate_type(a.input.scalar_type());
    weight = channels_last_weight(a.weight, type);
    if (a.bias) bias = a.bias->to(type).contiguous();
    const int64_t height = image.size(2), width = image.size(3);
    // a stride beyond the image's size gives the same output as that size, but the kernels would need more memory
    const int64_t stride = std::min(a.stride, std::max(height, width));
    sizes = {kernel_dtype(image.scalar_type()), image.size(0), image.size(1), height, width, a.weight.size(3), stride};
  }

  DepthwiseForward forward(void* output, int64_t output_column) const {
    return {sizes,
            activation,
            image_of(image),
            weight.const_data_ptr(),
            bias.defined() ? bias.const_data_ptr() : nullptr,
            {},
            {},
            nullptr,
            nullptr,
            output,
            output_column};
  }
};

}  // namespace

at::Tensor DepthwiseBackend::depthwise_conv2d(const DepthwiseArguments& arguments,
                                              const std::optional<at::Tensor>& residual) const {
  arguments.check(residual);
  at::Tensor output = arguments.output();
  if (output.numel() == 0) return output;
  const DepthwiseInputs inputs(arguments);
  DepthwiseForward p = inputs.forward(output.mutable_data_ptr(), output.size(1));
  const at::Tensor added = residual ? channels_contiguous(*residual) : at::Tensor();
  if (residual) p.residual = image_of(added);
  forward(p);
  return output;
}

void DepthwiseBackend::depthwise_conv2d_into(void* output, int64_t output_column, const DepthwiseArguments& arguments,
                                             const at::Tensor& scale, const at::Tensor& shift) const {
  const at::ScalarType type = accumulate_type(arguments.input.scalar_type());
  const at::Tensor scales = scale.to(type).contiguous(), shifts = shift.to(type).contiguous();
  const DepthwiseInputs inputs(arguments);
  DepthwiseForward p = inputs.forward(output, output_column);
  p.scale = scales.const_data_ptr();
  p.shift = shifts.const_data_ptr();
  forward(p);
}

DepthwiseGradients DepthwiseBackend::depthwise_conv2d_backward(const at::Tensor& grad_output,
                                                               const DepthwiseArguments& arguments) const {
  arguments.check_backward(grad_output);
  if (arguments.input.numel() == 0) return zeroed(arguments.gradients());
  auto [grad_input, grad_weight, grad_bias] = arguments.gradients();
  const DepthwiseInputs inputs(arguments);
  const DepthwiseSizes& sizes = inputs.sizes;

  at::Tensor grad = channels_contiguous(grad_output);
  if (inputs.activation != Activation::none) {  // computes the convolution again for the activation's derivative
    at::Tensor before_activation = arguments.output();
    DepthwiseForward p = inputs.forward(before_activation.mutable_data_ptr(), sizes.channels);
    p.grad_output = image_of(grad);
    forward(p);
    grad = before_activation;
  }

  if (sizes.stride == 1) {
    const at::Tensor flipped = inputs.weight.flip({0, 1});
    forward({sizes,
             Activation::none,
             image_of(grad),
             flipped.const_data_ptr(),
             nullptr,
             {},
             {},
             nullptr,
             nullptr,
             grad_input.mutable_data_ptr(),
             sizes.channels});
  } else {
    backward_input({sizes, image_of(grad), inputs.weight.const_data_ptr(), grad_input.mutable_data_ptr()});
  }

  const int64_t slabs = backward_weight_slabs(sizes), taps = sizes.kernel * sizes.kernel;
  const at::Tensor partial = at::empty({slabs, taps + 1, sizes.channels}, grad_weight.options());
  backward_weight({sizes, slabs, image_of(grad), image_of(inputs.image), partial.mutable_data_ptr()});
  const at::Tensor sum = slabs == 1 ? partial[0] : partial.sum(0);
  grad_weight.view({sizes.channels, taps}).copy_(sum.narrow(0, 0, taps).t());
  grad_bias.copy_(sum[taps]);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace mobilemamba
