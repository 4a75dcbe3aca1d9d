// The host side of the feed-forward layer; see the header.
#include "ops/ffn.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zero.h>

#include "ops/matrix.h"

namespace mobilemamba {
namespace {

void check_shared(const Checks& check, const FfnArguments& a) {
  const FfnWeights& w = a.weights;
  check.dimensions("input", a.input, 4, image_layout);
  check.dimensions("expand_bias", w.expand_bias, 1, "(hidden)");
  const c10::SymInt channels = a.input.sym_size(1), hidden = w.expand_bias.sym_size(0);
  check.at_least_one("a hidden width", hidden, "expand_bias", w.expand_bias);
  check_matrix(check, "expand_weight", w.expand_weight, hidden, channels);
  check.parameter("expand_bias", w.expand_bias, {hidden}, "(hidden)");
  check_matrix(check, "project_weight", w.project_weight, channels, hidden);
  check.parameter("project_bias", w.project_bias, {channels}, "(channels)");
}

}  // namespace

void FfnArguments::check() const {
  const Checks check("ffn", "input", input);
  check_shared(check, *this);
  if (residual) check.like_main("residual", *residual, input.sym_sizes(), image_layout);
}

void FfnArguments::check_backward(const at::Tensor& grad_output) const {
  const Checks check("ffn_backward", "input", input);
  check_shared(check, *this);
  check.like_main("grad_output", grad_output, input.sym_sizes(), image_layout);
}

FfnGradients FfnArguments::gradients() const {
  return {empty_image(input), empty_parameter(weights.expand_weight), empty_parameter(weights.expand_bias),
          empty_parameter(weights.project_weight), empty_parameter(weights.project_bias)};
}

at::Tensor FfnArguments::with(at::Tensor (*layer)(const FfnRows&)) const {
  check();
  if (input.numel() == 0) return empty_image(input);
  const at::Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor added = residual ? positions(residual->contiguous(at::MemoryFormat::ChannelsLast)) : at::Tensor();
  return image(layer({positions(x), added, weights}), x);
}

at::Tensor FfnRows::output() const {
  return at::empty(input.sizes(), input.options());
}

at::Tensor ffn_of_products(const FfnRows& rows, ProductFunction product) {
  const FfnWeights& w = rows.weights;
  const at::Tensor& x = rows.input;
  const at::Tensor hidden = at::empty({x.size(0), w.expand_bias.size(0)}, x.options());
  at::Tensor output = rows.output();
  product({.input = x, .weight = w.expand_weight, .bias = w.expand_bias, .relu = true}, hidden);
  product({.input = hidden,
           .weight = w.project_weight,
           .bias = w.project_bias,
           .residual = x,
           .second_residual = rows.residual},
          output);
  return output;
}

FfnGradients ffn_backward_composed(const at::Tensor& grad_output, const FfnArguments& arguments) {
  arguments.check_backward(grad_output);
  if (arguments.input.numel() == 0) return zeroed(arguments.gradients());
  const FfnWeights& w = arguments.weights;
  const at::Tensor input = arguments.input.contiguous(at::MemoryFormat::ChannelsLast), x = positions(input);
  const at::Tensor grad = positions(grad_output.contiguous(at::MemoryFormat::ChannelsLast));
  const int64_t channels = x.size(1), hidden_width = w.expand_bias.size(0);
  const at::Tensor expand_weight = plain_matrix(w.expand_weight, hidden_width, channels);
  const at::Tensor project_weight = plain_matrix(w.project_weight, channels, hidden_width);
  const at::Tensor hidden = linear_with_torch(x, expand_weight, w.expand_bias, hidden_width).relu_();
  const at::Tensor grad_hidden = at::threshold_backward(at::matmul(grad, project_weight), hidden, 0);
  return {image(at::addmm(grad, grad_hidden, expand_weight), input),
          matrix_gradient(at::matmul(grad_hidden.t(), x), w.expand_weight),
          parameter_gradient(grad_hidden.sum(0), w.expand_bias),
          matrix_gradient(at::matmul(grad.t(), hidden), w.project_weight),
          parameter_gradient(grad.sum(0), w.project_bias)};
}

}  // namespace mobilemamba
