// The host side of convolution and batch normalisation in training; see the header.
#include "ops/conv_norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/var_mean.h>
#include <ATen/ops/where.h>

#include "ops/common.h"

namespace mobilemamba {
namespace {

constexpr const char* conv_output_layout = "(batch, out_channels, ceil(height / stride), ceil(width / stride))";

std::vector<c10::SymInt> output_sizes(const ConvNormArguments& a) {
  const auto strided = [&](int64_t dim) { return ceil_div(a.input.sym_size(dim), a.stride); };
  return {a.input.sym_size(0), a.weight.sym_size(0), strided(2), strided(3)};
}

void check_shared(const Checks& check, const ConvNormArguments& a) {
  check.dimensions("input", a.input, 4, image_layout);
  check.dimensions("weight", a.weight, 4, "(out_channels, in_channels / groups, k, k)");
  const c10::SymInt channels = a.input.sym_size(1), out = a.weight.sym_size(0);
  if (a.depthwise())
    check.kernel("weight", a.weight, channels, 1, "(channels, 1, k, k)");
  else
    check.kernel("weight", a.weight, out, channels.guard_int(__FILE__, __LINE__), "(out_channels, in_channels, k, k)");
  check.like_main("weight", a.weight);
  check.parameter("norm_weight", a.norm_weight, {out}, "(out_channels)");
  check.parameter("norm_bias", a.norm_bias, {out}, "(out_channels)");
}

}  // namespace

bool ConvNormArguments::depthwise() const {
  return TORCH_GUARD_OR_FALSE(weight.sym_size(1).sym_eq(1)) && TORCH_GUARD_OR_FALSE(input.sym_size(1).sym_ne(1));
}

bool ConvNormArguments::pointwise() const {
  return !depthwise() && weight.size(3) == 1 && stride == 1;
}

void ConvNormArguments::check(const std::optional<at::Tensor>& residual) const {
  const Checks check("conv_norm", "input", input);
  check_stride("conv_norm", "stride", stride);
  TORCH_CHECK(activation == "none" || activation == "relu", "conv_norm: activation is \"", activation,
              "\", expected \"none\" or \"relu\"");
  check_shared(check, *this);
  const std::vector<c10::SymInt> sizes = output_sizes(*this);
  TORCH_SYM_CHECK((sizes[0] * sizes[2] * sizes[3]).sym_ge(2), "conv_norm: the output has shape ", sizes,
                  ", expected more than one position for the statistics of a channel");
  if (residual) check.like_main("residual", *residual, sizes, conv_output_layout);
}

void ConvNormArguments::check_backward(const at::Tensor& grad_output, const at::Tensor& convolved,
                                       const at::Tensor& mean, const at::Tensor& var) const {
  check(std::nullopt);
  const Checks check("conv_norm_backward", "input", input);
  const std::vector<c10::SymInt> sizes = output_sizes(*this);
  check.like_main("grad_output", grad_output, sizes, conv_output_layout);
  if (!depthwise()) check.like_main("convolved", convolved, sizes, conv_output_layout);
  check.parameter("mean", mean, {sizes[1]}, "(out_channels)");
  check.parameter("var", var, {sizes[1]}, "(out_channels)");
}

at::Tensor ConvNormArguments::output() const {
  return at::empty_symint(output_sizes(*this), input.options(), at::MemoryFormat::ChannelsLast);
}

at::Tensor ConvNormArguments::kept(const at::Tensor& convolved) const {
  return depthwise() ? at::empty({0}, input.options()) : convolved;
}

at::Tensor ConvNormArguments::per_channel() const {
  return at::empty_symint({weight.sym_size(0)}, input.options().dtype(accumulate_type(input.scalar_type())));
}

ConvNormGradients ConvNormArguments::gradients(bool input_gradient) const {
  return {input_gradient ? empty_image(input) : at::empty({0}, input.options()), empty_parameter(weight),
          empty_parameter(norm_weight), empty_parameter(norm_bias)};
}

at::Tensor convolve_with_torch(const ConvNormArguments& a) {
  const int64_t pad = a.weight.size(3) / 2, groups = a.depthwise() ? a.input.size(1) : 1;
  const at::Tensor x = a.input.contiguous(at::MemoryFormat::ChannelsLast);
  return at::conv2d(x, a.weight, {}, a.stride, pad, 1, groups).contiguous(at::MemoryFormat::ChannelsLast);
}

std::pair<at::Tensor, at::Tensor> convolution_gradients_with_torch(const at::Tensor& grad, const ConvNormArguments& a,
                                                                   bool input_gradient) {
  const int64_t pad = a.weight.size(3) / 2, groups = a.depthwise() ? a.input.size(1) : 1;
  const at::Tensor x = a.input.contiguous(at::MemoryFormat::ChannelsLast);
  const auto [grad_input, grad_weight, none] =
      at::convolution_backward(grad, x, a.weight, std::nullopt, {a.stride, a.stride}, {pad, pad}, {1, 1}, false, {0, 0},
                               groups, {input_gradient, true, false});
  return {input_gradient ? grad_input.contiguous(at::MemoryFormat::ChannelsLast) : at::empty({0}, x.options()),
          grad_weight.contiguous()};
}

namespace {

at::Tensor as_channels(const at::Tensor& per_channel) {
  return per_channel.view({1, -1, 1, 1});
}

}  // namespace

at::Tensor conv_norm_output_composed(const ConvNormArguments& a, const at::Tensor& convolved, const at::Tensor& mean,
                                     const at::Tensor& var) {
  const at::ScalarType sums = accumulate_type(convolved.scalar_type());
  const double positions = static_cast<double>(convolved.numel() / convolved.size(1));
  const at::Tensor inverse = (var.to(sums) * ((positions - 1) / positions) + a.eps).rsqrt();
  const at::Tensor scale = a.norm_weight.to(sums) * inverse;
  at::Tensor y = convolved.to(sums) * as_channels(scale) + as_channels(a.norm_bias.to(sums) - mean * scale);
  return a.relu() ? y.clamp_min_(0) : y;
}

ConvNormResult conv_norm_composed(const ConvNormArguments& a, const std::optional<at::Tensor>& residual) {
  a.check(residual);
  const at::ScalarType sums = accumulate_type(a.input.scalar_type());
  const at::Tensor convolved = convolve_with_torch(a);
  const auto [var, mean] = at::var_mean(convolved.to(sums), at::IntArrayRef{0, 2, 3}, true);
  at::Tensor y = conv_norm_output_composed(a, convolved, mean, var);
  if (residual) y += *residual;
  return {y.to(a.input.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast), mean, var, a.kept(convolved)};
}

ConvNormGradients conv_norm_backward_composed(const at::Tensor& grad_output, const ConvNormArguments& a,
                                              const at::Tensor& convolved, const at::Tensor& mean,
                                              const at::Tensor& var, bool input_gradient) {
  a.check_backward(grad_output, convolved, mean, var);
  const at::ScalarType sums = accumulate_type(a.input.scalar_type());
  const at::Tensor x = (a.depthwise() ? convolve_with_torch(a) : convolved).to(sums);
  const double positions = static_cast<double>(x.numel() / x.size(1));
  const at::Tensor inverse = (var.to(sums) * ((positions - 1) / positions) + a.eps).rsqrt();
  const at::Tensor normalized = (x - as_channels(mean.to(sums))) * as_channels(inverse);
  const at::Tensor weight = a.norm_weight.to(sums);
  at::Tensor grad = grad_output.to(sums);
  if (a.relu()) {
    const at::Tensor y = normalized * as_channels(weight) + as_channels(a.norm_bias.to(sums));
    grad = at::where(y > 0, grad, 0);
  }
  const at::Tensor grad_bias = grad.sum({0, 2, 3}), grad_weight = (grad * normalized).sum({0, 2, 3});
  const at::Tensor centred =
      grad - as_channels(grad_bias / positions) - normalized * as_channels(grad_weight / positions);
  const at::Tensor grad_convolved = (centred * as_channels(weight * inverse)).to(a.input.scalar_type());
  const auto [grad_input, grad_conv_weight] =
      convolution_gradients_with_torch(grad_convolved.contiguous(at::MemoryFormat::ChannelsLast), a, input_gradient);
  return {grad_input, grad_conv_weight, grad_weight.to(a.norm_weight.scalar_type()),
          grad_bias.to(a.norm_bias.scalar_type())};
}

}  // namespace mobilemamba
