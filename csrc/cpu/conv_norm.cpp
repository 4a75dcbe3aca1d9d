// Convolution and batch normalisation in training on the CPU. A matrix product takes the rows of a part through all of
// its steps before the next part, so that the gradient of the convolution's output is never in memory.
#include "ops/conv_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include "cpu/backends.h"
#include "cpu/image_patches.h"
#include "cpu/norm_product.h"
#include "cpu/run.h"
#include "ops/common.h"
#include "ops/matrix.h"
#include "ops/packed_conv2d.h"
#include "registration.h"

namespace mobilemamba::cpu {
namespace {

Activation activation_of(const ConvNormArguments& a) {
  return a.relu() ? Activation::relu : Activation::none;
}

/// The input with contiguous channels; patches are gathered from contiguous images.
at::Tensor image_rows(const ConvNormArguments& a) {
  return a.pointwise() ? channels_contiguous(a.input) : a.input.contiguous(at::MemoryFormat::ChannelsLast);
}

/// A convolution that is a product of a matrix and a weight (out, in): the rows are the pixels of the input, or their
/// patches.
class RowsOfImage {
 public:
  RowsOfImage(const ConvNormArguments& a, const at::Tensor& x)
      : patches_(x, a.weight.size(3), a.stride),
        pixels_(a.pointwise() ? positions(x) : at::Tensor()),
        weight_(a.weight.permute({0, 2, 3, 1}).flatten(1).contiguous()) {}

  const at::Tensor& weight() const { return weight_; }
  int64_t rows() const { return patches_.images() * patches_.rows_of_image(); }
  int64_t in() const { return weight_.size(1); }
  /// Bytes that `of` and `add_gradient` each need for a row.
  size_t scratch_bytes() const { return pixels_.defined() ? 0 : in() * weight_.element_size(); }

  at::Tensor of(int64_t first, int64_t size, std::byte* scratch) const {
    if (pixels_.defined()) return pixels_.narrow(0, first, size);
    patches_.gather(first, size, scratch);
    return at::from_blob(scratch, {size, in()}, weight_.options());
  }

  /// Adds the input's gradient; `right` is the weight.
  void add_gradient(const at::Tensor& grad, const ProductWeight& right, int64_t first, std::byte* scratch,
                    const at::Tensor& grad_input) const {
    if (pixels_.defined()) return input_gradient(grad, right, first, positions(grad_input));
    right.multiply(grad, at::from_blob(scratch, {grad.size(0), in()}, weight_.options()));
    patches_.clear(first, grad.size(0), grad_input);
    patches_.scatter(first, grad.size(0), scratch, grad_input);
  }

  /// The parts of the backward pass: threads must not add to the same image.
  Parts backward_parts(int64_t multiple) const {
    const int64_t out = weight_.size(0);
    return pixels_.defined() ? Parts(rows(), in(), out, multiple)
                             : Parts::of_images(patches_.images(), patches_.rows_of_image(), in(), out);
  }

 private:
  ImagePatches patches_;
  at::Tensor pixels_;  // undefined for patches
  at::Tensor weight_;
};

at::Tensor convolve_depthwise(const ConvNormArguments& a) {
  return depthwise.depthwise_conv2d({a.input, a.weight, std::nullopt, a.stride, "none"}, std::nullopt);
}

at::Tensor convolve(const ConvNormArguments& a) {
  if (a.depthwise()) return convolve_depthwise(a);
  if (a.input.scalar_type() != at::kFloat) return convolve_with_torch(a);
  const at::Tensor bias = at::zeros({a.weight.size(0)}, a.weight.options());
  return PackedConvArguments{a.input, pack_conv2d_weight(a.weight), bias, std::nullopt, a.weight.size(3), a.stride,
                             "none"}
      .with(run_packed_conv);
}

/// Whether torch's convolution computes the gradients: the sums of overlapping patches would be rounded to 16 bits.
bool by_torch(const ConvNormArguments& a) {
  return !a.depthwise() && !a.pointwise() && accumulate_type(a.input.scalar_type()) != a.input.scalar_type();
}

ConvNormResult forward(const ConvNormArguments& a, const std::optional<at::Tensor>& residual) {
  a.check(residual);
  const at::Tensor output = a.output();
  const int64_t channels = output.size(1), rows = output.numel() / channels;
  const NormLayout layout(output.scalar_type(), rows, channels);
  NormLayout::Moments moments;
  at::Tensor convolved;
  if (a.pointwise()) {
    convolved = a.output();
    const RowsOfImage x(a, image_rows(a));
    const auto rows_of = [&](int64_t first, int64_t size, std::byte* scratch) { return x.of(first, size, scratch); };
    moments = multiply(Parts(rows, x.in(), channels, layout.part_rows()), 0, rows_of, x.weight(), positions(convolved));
  } else {
    convolved = convolve(a);
    const at::Tensor sums = layout.sums(rows);
    run(kernels().norm_statistics,
        {layout.sizes(rows), layout.rows(convolved.const_data_ptr()), sums.mutable_data_ptr()});
    moments = layout.join_moments(sums, rows);
  }
  const Norm norm(positions(convolved), moments, a.norm_weight, a.norm_bias, a.eps, activation_of(a), rows);
  const at::Tensor added = residual ? residual->contiguous(at::MemoryFormat::ChannelsLast) : at::Tensor();
  run(kernels().norm_forward,
      norm.forward(0, rows, residual ? added.const_data_ptr() : nullptr, output.mutable_data_ptr()));
  return {output, layout.to_tensor(moments.mean), layout.to_tensor(moments.var), a.kept(convolved)};
}

ConvNormGradients backward(const at::Tensor& grad_output, const ConvNormArguments& a, const at::Tensor& convolved,
                           const at::Tensor& mean, const at::Tensor& var, bool wants_input) {
  a.check_backward(grad_output, convolved, mean, var);
  const at::Tensor grad = grad_output.contiguous(at::MemoryFormat::ChannelsLast), grad_rows = positions(grad);
  const at::Tensor before =
      a.depthwise() ? convolve_depthwise(a) : convolved.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t channels = before.size(1), rows = before.numel() / channels;
  const bool whole_images = !a.pointwise() && !a.depthwise();
  Norm norm(positions(before), {channels_of(mean), channels_of(var)}, a.norm_weight, a.norm_bias, a.eps,
            activation_of(a), whole_images ? before.size(2) * before.size(3) : rows);
  const at::Tensor sums = norm.layout().sums(rows);
  run(kernels().norm_backward_sums, norm.backward_sums(0, rows, grad_rows, sums));
  norm.solve(sums);

  at::Tensor grad_weight, grad_input = wants_input ? empty_image(a.input) : at::empty({0}, a.input.options());
  if (a.depthwise() || by_torch(a)) {
    const at::Tensor grad_convolved = empty_image(before);
    run(kernels().norm_backward_input, norm.backward_input(0, rows, grad_rows, grad_convolved.mutable_data_ptr()));
    if (a.depthwise()) {
      at::Tensor grad_depthwise;
      std::tie(grad_depthwise, grad_weight, std::ignore) =
          depthwise.depthwise_conv2d_backward(grad_convolved, {a.input, a.weight, std::nullopt, a.stride, "none"});
      if (wants_input) grad_input = grad_depthwise;
    } else {
      std::tie(grad_input, grad_weight) = convolution_gradients_with_torch(grad_convolved, a, wants_input);
    }
  } else {
    const RowsOfImage x(a, image_rows(a));
    const Parts parts = x.backward_parts(norm.layout().part_rows());
    const std::optional<ProductWeight> right = wants_input ? std::optional<ProductWeight>(x.weight()) : std::nullopt;
    const size_t grad_bytes = ceil_div(parts.largest() * channels * before.element_size(), 64) * 64;
    const auto rows_of = [&](int64_t first, int64_t size, std::byte* scratch) -> ProductRows {
      run_here(kernels().norm_backward_input, norm.backward_input(first, size, grad_rows, scratch));
      const at::Tensor part = at::from_blob(scratch, {size, channels}, before.options());
      if (right) x.add_gradient(part, *right, first, scratch + grad_bytes, grad_input);
      return {part, x.of(first, size, scratch + grad_bytes)};
    };
    grad_weight = weight_gradient(parts, grad_bytes + parts.largest() * x.scratch_bytes(), rows_of, x.weight());
    const int64_t k = a.weight.size(3);
    grad_weight = grad_weight.view({channels, k, k, -1}).permute({0, 3, 1, 2});
  }
  return {grad_input, parameter_gradient(grad_weight, a.weight), parameter_gradient(norm.grad_weight(), a.norm_weight),
          parameter_gradient(norm.grad_bias(), a.norm_bias)};
}

ConvNormResult conv_norm_cpu(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& norm_weight,
                             const at::Tensor& norm_bias, const std::optional<at::Tensor>& residual, int64_t stride,
                             std::string_view activation, double eps) {
  return forward({input, weight, norm_weight, norm_bias, stride, activation, eps}, residual);
}

ConvNormGradients conv_norm_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                         const at::Tensor& weight, const at::Tensor& norm_weight,
                                         const at::Tensor& norm_bias, const at::Tensor& convolved,
                                         const at::Tensor& mean, const at::Tensor& var, int64_t stride,
                                         std::string_view activation, double eps, bool input_gradient) {
  return backward(grad_output, {input, weight, norm_weight, norm_bias, stride, activation, eps}, convolved, mean, var,
                  input_gradient);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("conv_norm", conv_norm_cpu);
  m.impl("conv_norm_backward", conv_norm_backward_cpu);
}

}  // namespace mobilemamba::cpu
