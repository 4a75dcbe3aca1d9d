// Host side of the feed-forward layer; see the header.
#include "ops/ffn.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>

#include "ops/matrix.h"

namespace mobilemamba {

at::Tensor ffn(const at::Tensor& input, const std::optional<at::Tensor>& residual, const at::Tensor& expand_weight,
               const at::Tensor& expand_bias, const at::Tensor& project_weight, const at::Tensor& project_bias) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mobilemamba::ffn", "").typed<decltype(ffn)>();
  return op.call(input, residual, expand_weight, expand_bias, project_weight, project_bias);
}

FfnGradients ffn_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& expand_weight,
                          const at::Tensor& expand_bias, const at::Tensor& project_weight,
                          const at::Tensor& project_bias) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mobilemamba::ffn_backward", "").typed<decltype(ffn_backward)>();
  return op.call(grad_output, input, expand_weight, expand_bias, project_weight, project_bias);
}

namespace {

void check_arguments(const Checks& check, const FfnArguments& a) {
  const FfnWeights& w = a.weights;
  check.dimensions("input", a.input, 4, "(batch, channels, height, width)");
  check.dimensions("expand_bias", w.expand_bias, 1, "(hidden)");
  const c10::SymInt channels = a.input.sym_size(1), hidden = w.expand_bias.sym_size(0);
  check.at_least_one("a hidden width", hidden, "expand_bias", w.expand_bias);
  check_matrix(check, "expand_weight", w.expand_weight, hidden, channels);
  check.parameter("expand_bias", w.expand_bias);
  check_matrix(check, "project_weight", w.project_weight, channels, hidden);
  check.shape("project_bias", w.project_bias, {channels}, "(channels)");
  check.parameter("project_bias", w.project_bias);
}

}  // namespace

void FfnArguments::check(const std::optional<at::Tensor>& residual) const {
  const Checks check("ffn", "input", input);
  check_arguments(check, *this);
  if (residual) {
    check.shape("residual", *residual, input.sym_sizes(), "(batch, channels, height, width)");
    check.like_main("residual", *residual);
  }
}

void FfnArguments::check_backward(const at::Tensor& grad_output) const {
  const Checks check("ffn_backward", "input", input);
  check_arguments(check, *this);
  check.shape("grad_output", grad_output, input.sym_sizes(), "(batch, channels, height, width)");
  check.like_main("grad_output", grad_output);
}

at::Tensor FfnArguments::output() const {
  return at::empty_symint(input.sym_sizes(), input.options(), at::MemoryFormat::ChannelsLast);
}

FfnGradients FfnArguments::gradients() const {
  const auto like = [](const at::Tensor& weight) { return at::empty_symint(weight.sym_sizes(), weight.options()); };
  return {output(), like(weights.expand_weight), like(weights.expand_bias), like(weights.project_weight),
          like(weights.project_bias)};
}

at::Tensor FfnArguments::with(at::Tensor (*layer)(const FfnRows&), const std::optional<at::Tensor>& residual) const {
  check(residual);
  if (input.numel() == 0) return output();
  const at::Tensor x = input.contiguous(at::MemoryFormat::ChannelsLast);
  std::optional<at::Tensor> added;
  if (residual) added = positions(residual->contiguous(at::MemoryFormat::ChannelsLast));
  return image(layer({positions(x), added, weights}), x);
}

at::Tensor ffn_with_torch(const FfnRows& rows) {
  const FfnWeights& w = rows.weights;
  const at::Tensor& x = rows.input;
  const at::Tensor hidden = linear_with_torch(x, w.expand_weight, w.expand_bias, w.expand_bias.size(0)).relu_();
  at::Tensor y = linear_with_torch(hidden, w.project_weight, w.project_bias, x.size(1)).add_(x);
  return rows.residual ? y.add_(*rows.residual) : y;
}

FfnGradients ffn_backward_composed(const at::Tensor& grad_output, const FfnArguments& arguments) {
  arguments.check_backward(grad_output);
  const FfnWeights& w = arguments.weights;
  if (arguments.input.numel() == 0)
    return {arguments.output(), at::zeros_like(w.expand_weight, at::MemoryFormat::Contiguous),
            at::zeros_like(w.expand_bias, at::MemoryFormat::Contiguous),
            at::zeros_like(w.project_weight, at::MemoryFormat::Contiguous),
            at::zeros_like(w.project_bias, at::MemoryFormat::Contiguous)};
  const at::Tensor input = arguments.input.contiguous(at::MemoryFormat::ChannelsLast), x = positions(input);
  const at::Tensor grad = positions(grad_output.contiguous(at::MemoryFormat::ChannelsLast));
  const int64_t channels = x.size(1), hidden_width = w.expand_bias.size(0);
  const at::Tensor expand_weight = matrix_of(w.expand_weight, hidden_width, channels);
  const at::Tensor project_weight = matrix_of(w.project_weight, channels, hidden_width);
  const at::Tensor hidden = linear_with_torch(x, expand_weight, w.expand_bias, hidden_width).relu_();
  const at::Tensor grad_hidden = at::threshold_backward(at::matmul(grad, project_weight), hidden, 0);
  return {image(at::addmm(grad, grad_hidden, expand_weight), input),
          matrix_gradient(at::matmul(grad_hidden.t(), x), w.expand_weight),
          parameter_gradient(grad_hidden.sum(0), w.expand_bias),
          matrix_gradient(at::matmul(grad.t(), hidden), w.project_weight),
          parameter_gradient(grad.sum(0), w.project_bias)};
}

}  // namespace mobilemamba
