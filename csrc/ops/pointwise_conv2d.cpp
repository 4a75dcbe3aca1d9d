// Host side of the pointwise convolution; see the header.
#include "ops/pointwise_conv2d.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

#include "ops/common.h"

namespace mobilemamba {

at::Tensor pointwise_conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                            const std::optional<at::Tensor>& residual, std::string_view activation) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mobilemamba::pointwise_conv2d", "")
                             .typed<decltype(pointwise_conv2d)>();
  return op.call(input, weight, bias, residual, activation);
}

at::Tensor pack_pointwise_weight(const at::Tensor& weight) {
  constexpr int64_t panel = PointwiseForward::panel;
  TORCH_CHECK(weight.dim() == 2, "pack_pointwise_weight: weight has shape ", weight.sizes(),
              ", expected 2 dimensions (out_channels, in_channels)");
  const int64_t out = weight.size(0), in = weight.size(1), panels = (out + panel - 1) / panel, pairs = (in + 1) / 2;
  const at::Tensor padded = at::constant_pad_nd(weight, {0, 2 * pairs - in, 0, panels * panel - out});
  return padded.view({panels, panel, pairs, 2}).permute({0, 2, 1, 3}).contiguous();
}

TORCH_LIBRARY_IMPL(mobilemamba, CompositeImplicitAutograd, m) {
  m.impl("pack_pointwise_weight", pack_pointwise_weight);
}

at::Tensor unpack_pointwise_weight(const at::Tensor& packed, int64_t out_channels, int64_t in_channels) {
  const at::Tensor padded = packed.permute({0, 2, 1, 3}).reshape({packed.size(0) * packed.size(2), -1});
  return padded.narrow(0, 0, out_channels).narrow(1, 0, in_channels);
}

void PointwiseArguments::check() const {
  constexpr int64_t panel = PointwiseForward::panel;
  const Checks check("pointwise_conv2d", "input", input);
  check.dimensions("input", input, 4, "(batch, in_channels, height, width)");
  check.dimensions("bias", bias, 1, "(out_channels)");
  const c10::SymInt out = bias.sym_size(0), in = input.sym_size(1);
  check.shape("weight", weight, {(out + (panel - 1)) / panel, (in + 1) / 2, panel, 2},
              "(ceil(out_channels / 32), ceil(in_channels / 2), 32, 2), as packed");
  check.like_main("weight", weight);
  check.parameter("bias", bias);
  if (residual) {
    check.shape("residual", *residual, {input.sym_size(0), out, input.sym_size(2), input.sym_size(3)},
                "(batch, out_channels, height, width)");
    check.like_main("residual", *residual);
  }
  TORCH_CHECK(activation == "none" || activation == "relu", "pointwise_conv2d: activation is \"", activation,
              "\", expected \"none\" or \"relu\"");
}

at::Tensor PointwiseArguments::output() const {
  return at::empty_symint({input.sym_size(0), bias.sym_size(0), input.sym_size(2), input.sym_size(3)}, input.options(),
                          at::MemoryFormat::ChannelsLast);
}

at::Tensor PointwiseArguments::with_matmul() const {
  check();
  const at::Tensor plain = unpack_pointwise_weight(weight, bias.size(0), input.size(1));
  at::Tensor y = at::linear(input.permute({0, 2, 3, 1}), plain, bias.to(input.scalar_type())).permute({0, 3, 1, 2});
  if (activation == "relu") y.relu_();
  return residual ? y.add_(*residual) : y;
}

namespace {

/// A tensor whose positions are rows at equal distances, channels contiguous: the same one where it is so already.
at::Tensor rows_of(const at::Tensor& x) {
  const at::Tensor y = channels_contiguous(x);
  const int64_t row = y.stride(3);
  const bool uniform = (y.size(2) <= 1 || y.stride(2) == y.size(3) * row) &&
                       (y.size(0) <= 1 || y.stride(0) == y.size(2) * y.size(3) * row) && y.size(3) > 1;
  return uniform ? y : y.contiguous(at::MemoryFormat::ChannelsLast);
}

/// Elements from row to row; a size of 1 says nothing about its stride.
int64_t row_stride(const at::Tensor& rows) {
  return rows.size(3) > 1 ? rows.stride(3) : rows.size(1);
}

}  // namespace

at::Tensor PointwiseArguments::with(void (*kernel)(const PointwiseForward&)) const {
  check();
  at::Tensor y = output();
  if (y.numel() == 0) return y;
  const at::Tensor x = rows_of(input), packed = weight.contiguous();
  const at::Tensor sums_bias = bias.to(at::kFloat).contiguous();
  const at::Tensor added = residual ? rows_of(*residual) : at::Tensor();
  kernel({
      .dtype = kernel_dtype(input.scalar_type()),
      .rows = x.size(0) * x.size(2) * x.size(3),
      .in_channels = x.size(1),
      .out_channels = bias.size(0),
      .activation = activation == "relu" ? Activation::relu : Activation::none,
      .input = x.const_data_ptr(),
      .input_row = row_stride(x),
      .weight = packed.const_data_ptr(),
      .bias = sums_bias.const_data_ptr(),
      .residual = residual ? added.const_data_ptr() : nullptr,
      .residual_row = residual ? row_stride(added) : 0,
      .output = y.mutable_data_ptr(),
      .output_row = y.size(1),
  });
  return y;
}

}  // namespace mobilemamba
