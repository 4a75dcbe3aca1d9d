// The host side of the convolution on a packed weight; see the header.
#include "ops/packed_conv2d.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "registration.h"

namespace mobilemamba {

namespace {

constexpr int64_t panel = PackedConvForward::panel;

/// A weight (out, in, k, k) as (out, k * k * in).
at::Tensor patch_rows(const char* op, const at::Tensor& weight) {
  check_sizes(op, "weight", weight.sym_sizes());
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && weight.size(3) % 2 == 1 &&
                  weight.size(3) <= largest_kernel_size,
              op, ": weight has shape ", weight.sizes(),
              ", expected 4 dimensions (out_channels, in_channels, k, k), k odd and at most ", largest_kernel_size);
  return weight.permute({0, 2, 3, 1}).flatten(1);
}

/// Rows (out, in) in panels (ceil(out / 32), ceil(in / adjacent), 32, adjacent), padded with zeros.
at::Tensor in_panels(const at::Tensor& rows, int64_t adjacent) {
  const int64_t out = rows.size(0), in = rows.size(1), panels = ceil_div(out, panel), steps = ceil_div(in, adjacent);
  const at::Tensor padded = at::constant_pad_nd(rows, {0, adjacent * steps - in, 0, panels * panel - out});
  // clone() always copies; contiguous() would keep the strides of dimensions of size 1, which Meta does not know
  return padded.view({panels, panel, steps, adjacent}).permute({0, 2, 1, 3}).clone(at::MemoryFormat::Contiguous);
}

}  // namespace

at::Tensor pack_conv2d_weight(const at::Tensor& weight) {
  return in_panels(patch_rows("pack_conv2d_weight", weight), 2);
}

at::Tensor quantize_conv2d_weight(const at::Tensor& weight, double scale, int64_t zero_point) {
  constexpr const char* op = "quantize_conv2d_weight";
  const at::Tensor rows = patch_rows(op, weight.detach()).to(at::kFloat);
  TORCH_CHECK(weight.is_floating_point(), op, ": weight is ", weight.scalar_type(), ", expected a floating-point type");
  TORCH_CHECK(rows.size(1) <= PackedConvForward::most_quantized_inputs, op, ": weight has ", rows.size(1),
              " inputs for each output, expected at most ", PackedConvForward::most_quantized_inputs);
  TORCH_CHECK(std::isfinite(static_cast<float>(1 / scale)) && static_cast<float>(scale) > 0 && std::isfinite(scale), op,
              ": scale is ", scale, ", expected a positive number that float32 has, like its inverse");
  TORCH_CHECK(zero_point >= 0 && zero_point <= 255, op, ": zero_point is ", zero_point, ", expected 0 to 255");
  constexpr float most = 127;
  at::Tensor own_scale = rows.numel() ? rows.abs().amax(1) / most : at::zeros({rows.size(0)}, rows.options());
  TORCH_CHECK(rows.is_meta() || own_scale.isfinite().all().item<bool>(), op, ": weight has infinite elements or NaN");
  own_scale = at::where(own_scale == 0, at::ones_like(own_scale), own_scale);
  const at::Tensor quantized = (rows / own_scale.unsqueeze(1)).round();
  const auto word = [](const at::Tensor& x) { return in_panels(x.contiguous().unsqueeze(1).view(at::kChar), 4); };
  const at::Tensor of_input = at::zeros_like(own_scale);
  const at::Tensor multiplier = own_scale * scale,
                   correction = (quantized.sum(1, false, at::kDouble) * zero_point).to(at::kInt);
  const int64_t panels = ceil_div(rows.size(0), panel);
  at::Tensor input_facts = at::zeros({panels, panel}, rows.options());
  input_facts.select(1, 0).fill_(static_cast<float>(1 / scale));
  input_facts.select(1, 1).fill_(static_cast<float>(zero_point));
  return at::cat({in_panels(quantized, PackedConvForward::group).to(at::kChar), word(multiplier), word(correction),
                  input_facts.view({panels * panel, 1}).view(at::kChar).view({panels, 1, panel, 4})},
                 1);
}

bool is_quantized(const at::Tensor& weight) {
  return weight.scalar_type() == at::kChar;
}

bool is_packed(const at::Tensor& weight) {
  return weight.dim() == 4 && (weight.sym_size(3) == 2 || is_quantized(weight));
}

void check_packed(const Checks& check, const char* name, const at::Tensor& weight, const c10::SymInt& out,
                  const c10::SymInt& patch) {
  if (is_quantized(weight))
    check.quantized(
        name, weight,
        {ceil_div(out, panel), ceil_div(patch, PackedConvForward::group) + PackedConvForward::quantized_facts, panel,
         PackedConvForward::word});
  else
    check.like_main(name, weight, {ceil_div(out, panel), ceil_div(patch, 2), panel, 2},
                    "as packed: (ceil(out / 32), ceil(in * kernel_size^2 / 2), 32, 2)");
}

MOBILEMAMBA_LIBRARY_IMPL(CompositeImplicitAutograd, m) {
  m.impl("pack_conv2d_weight", pack_conv2d_weight);
  m.impl("quantize_conv2d_weight", quantize_conv2d_weight);
}

at::Tensor unpack_conv2d_weight(const at::Tensor& packed, int64_t out_channels, int64_t in_channels,
                                int64_t kernel_size) {
  TORCH_CHECK(!is_quantized(packed),
              "mobilemamba: a weight is quantized, which serves inference on the CPU in float32 "
              "or 16 bits; gradients, float64 and other devices need weights that are not quantized");
  const at::Tensor padded = packed.permute({0, 2, 1, 3}).reshape({packed.size(0) * packed.size(2), -1});
  return padded.narrow(0, 0, out_channels)
      .narrow(1, 0, kernel_size * kernel_size * in_channels)
      .reshape({out_channels, kernel_size, kernel_size, in_channels})
      .permute({0, 3, 1, 2});
}

namespace {

std::vector<c10::SymInt> output_sizes(const PackedConvArguments& a) {
  const auto strided = [&](int64_t dim) -> c10::SymInt {
    const c10::SymInt size = a.input.sym_size(dim);
    if (const auto known = size.maybe_as_int()) return ceil_div(*known, a.stride);
    return (size - 1) / a.stride + 1;  // torch knows this form from its own convolution, and that it is at least 1
  };
  return {a.input.sym_size(0), a.bias.sym_size(0), strided(2), strided(3)};
}

}  // namespace

void PackedConvArguments::check() const {
  const Checks check("packed_conv2d", "input", input);
  check.dimensions("input", input, 4, "(batch, in_channels, height, width)");
  check.dimensions("bias", bias, 1, "(out_channels)");
  check_kernel_size("packed_conv2d", "kernel_size", kernel_size);
  check_stride("packed_conv2d", "stride", stride);
  check.at_least_one("in_channels", input.sym_size(1), "input", input);
  check.at_least_one("out_channels", bias.sym_size(0), "bias", bias);
  check_packed(check, "weight", weight, bias.sym_size(0), input.sym_size(1) * (kernel_size * kernel_size));
  check.parameter("bias", bias, {bias.sym_size(0)}, "(out_channels)");
  check_sizes("packed_conv2d", "the output", output_sizes(*this));
  if (residual)
    check.like_main("residual", *residual, output_sizes(*this), "(batch, out_channels, height, width) of the output");
  TORCH_CHECK(activation == "none" || activation == "relu", "packed_conv2d: activation is \"", activation,
              "\", expected \"none\" or \"relu\"");
}

at::Tensor PackedConvArguments::output() const {
  return at::empty_symint(output_sizes(*this), input.options(), at::MemoryFormat::ChannelsLast);
}

at::Tensor conv2d_with_torch(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                             int64_t stride) {
  const at::Tensor in_type = bias.to(input.scalar_type());
  if (weight.size(3) == 1 && stride == 1)  // torch computes the matrix product faster than this convolution
    return at::linear(input.permute({0, 2, 3, 1}), weight.flatten(1), in_type).permute({0, 3, 1, 2});
  return at::conv2d(input, weight, in_type, stride, weight.size(3) / 2);
}

at::Tensor PackedConvArguments::with_torch() const {
  check();
  if (input.numel() == 0) return output();
  const at::Tensor plain = unpack_conv2d_weight(weight, bias.size(0), input.size(1), kernel_size);
  at::Tensor y = conv2d_with_torch(input.contiguous(at::MemoryFormat::ChannelsLast), plain, bias, stride)
                     .contiguous(at::MemoryFormat::ChannelsLast);
  if (activation == "relu") y.relu_();
  return residual ? y.add_(*residual) : y;
}

namespace {

/// `x` with contiguous channels and positions at equal distances; copied only where it is not so.
at::Tensor with_uniform_rows(const at::Tensor& x) {
  const at::Tensor y = channels_contiguous(x);
  const int64_t row = y.stride(3);
  const bool uniform = (y.size(2) <= 1 || y.stride(2) == y.size(3) * row) &&
                       (y.size(0) <= 1 || y.stride(0) == y.size(2) * y.size(3) * row) && y.size(3) > 1;
  return uniform ? y : y.contiguous(at::MemoryFormat::ChannelsLast);
}

/// Elements from row to row. The stride of a dimension of size 1 has no meaning.
int64_t row_stride(const at::Tensor& rows) {
  return rows.size(3) > 1 ? rows.stride(3) : rows.size(1);
}

}  // namespace

at::Tensor PackedConvArguments::with(void (*kernel)(const PackedConvForward&)) const {
  check();
  at::Tensor y = output();
  if (y.numel() == 0) return y;
  const bool one_to_one = kernel_size == 1 && stride == 1;
  const at::Tensor x = one_to_one ? with_uniform_rows(input) : channels_contiguous(input);
  const at::Tensor panels = weight.contiguous();
  const at::Tensor sums_bias = bias.to(at::kFloat).contiguous();
  const at::Tensor added = residual ? with_uniform_rows(*residual) : at::Tensor();
  Image image = image_of(x);
  if (one_to_one) {
    image.column = row_stride(x);
    image.row = x.size(3) * image.column;
    image.batch = x.size(2) * image.row;
  }
  kernel({
      .dtype = kernel_dtype(input.scalar_type()),
      .batch = x.size(0),
      .in_channels = x.size(1),
      .height = x.size(2),
      .width = x.size(3),
      .out_channels = bias.size(0),
      .kernel = kernel_size,
      .stride = stride,
      .activation = activation == "relu" ? Activation::relu : Activation::none,
      .residual_inside = false,
      .input = image,
      .weight = panels.const_data_ptr(),
      .bias = sums_bias.const_data_ptr(),
      .residual = residual ? added.const_data_ptr() : nullptr,
      .residual_row = residual ? row_stride(added) : 0,
      .output = y.mutable_data_ptr(),
      .output_row = y.size(1),
      .quantized = is_quantized(weight),
  });
  return y;
}

}  // namespace mobilemamba
