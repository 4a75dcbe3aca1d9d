// The host side of the feed-forward layer in training; see the header.
#include "ops/ffn_norm.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>

#include "ops/common.h"

namespace mobilemamba {

FfnNormSaved::FfnNormSaved(at::TensorList list) {
  TORCH_CHECK(list.size() == 6, "ffn_norm_backward: saved has ", list.size(), " tensors, expected 6");
  at::Tensor* const members[] = {&expanded, &projected, &expand_mean, &expand_var, &project_mean, &project_var};
  for (size_t i = 0; i < list.size(); ++i)
    *members[i] = list[i];
}

FfnNormArguments ffn_norm_arguments(const at::Tensor& input, at::TensorList p, double expand_eps, double project_eps) {
  TORCH_CHECK(p.size() == 6, "ffn_norm_backward: parameters has ", p.size(), " tensors, expected 6");
  return {input, p[0], p[1], p[2], p[3], p[4], p[5], expand_eps, project_eps};
}

ConvNormArguments FfnNormArguments::expand() const {
  return {input, expand_weight, expand_norm_weight, expand_norm_bias, 1, "relu", expand_eps};
}

ConvNormArguments FfnNormArguments::project(const at::Tensor& hidden) const {
  return {hidden, project_weight, project_norm_weight, project_norm_bias, 1, "none", project_eps};
}

void FfnNormArguments::check() const {
  const Checks check("ffn_norm", "input", input);
  check.dimensions("input", input, 4, image_layout);
  check.dimensions("expand_weight", expand_weight, 4, "(hidden, channels, 1, 1)");
  const c10::SymInt channels = input.sym_size(1), hidden = expand_weight.sym_size(0);
  check.like_main("expand_weight", expand_weight, {hidden, channels, 1, 1}, "(hidden, channels, 1, 1)");
  check.parameter("expand_norm_weight", expand_norm_weight, {hidden}, "(hidden)");
  check.parameter("expand_norm_bias", expand_norm_bias, {hidden}, "(hidden)");
  check.like_main("project_weight", project_weight, {channels, hidden, 1, 1}, "(channels, hidden, 1, 1)");
  check.parameter("project_norm_weight", project_norm_weight, {channels}, "(channels)");
  check.parameter("project_norm_bias", project_norm_bias, {channels}, "(channels)");
  check.at_least_one("channels", channels, "input", input);
  check.at_least_one("a hidden width", hidden, "expand_weight", expand_weight);
  TORCH_SYM_CHECK((input.sym_size(0) * input.sym_size(2) * input.sym_size(3)).sym_ge(2), "ffn_norm: input has shape ",
                  input.sym_sizes(), ", expected more than one position for the statistics of a channel");
}

void FfnNormArguments::check_backward(const at::Tensor& grad_output, const FfnNormSaved& saved) const {
  check();
  const Checks check("ffn_norm_backward", "input", input);
  check.like_main("grad_output", grad_output, input.sym_sizes(), image_layout);
  check.like_main("expanded", saved.expanded, hidden().sym_sizes(), "(batch, hidden, height, width)");
  check.like_main("projected", saved.projected, input.sym_sizes(), image_layout);
  for (const auto& [name, tensor] : {std::pair{"expand_mean", saved.expand_mean}, {"expand_var", saved.expand_var}})
    check.parameter(name, tensor, {expand_weight.sym_size(0)}, "(hidden)");
  for (const auto& [name, tensor] : {std::pair{"project_mean", saved.project_mean}, {"project_var", saved.project_var}})
    check.parameter(name, tensor, {input.sym_size(1)}, "(channels)");
}

at::Tensor FfnNormArguments::hidden() const {
  return at::empty_symint({input.sym_size(0), expand_weight.sym_size(0), input.sym_size(2), input.sym_size(3)},
                          input.options(), at::MemoryFormat::ChannelsLast);
}

FfnNormResult FfnNormArguments::result() const {
  const auto values = [&](const at::Tensor& like) {
    return at::empty_symint(like.sym_sizes(), input.options().dtype(accumulate_type(input.scalar_type())));
  };
  return {empty_image(input),          values(expand_norm_weight),  values(expand_norm_weight),
          values(project_norm_weight), values(project_norm_weight), hidden(),
          empty_image(input)};
}

FfnNormGradients FfnNormArguments::gradients() const {
  return {empty_image(input),
          empty_parameter(expand_weight),
          empty_parameter(expand_norm_weight),
          empty_parameter(expand_norm_bias),
          empty_parameter(project_weight),
          empty_parameter(project_norm_weight),
          empty_parameter(project_norm_bias)};
}

FfnNormResult ffn_norm_composed(const FfnNormArguments& a) {
  a.check();
  const auto [hidden, expand_mean, expand_var, expanded] = conv_norm_composed(a.expand(), std::nullopt);
  const auto [output, project_mean, project_var, projected] = conv_norm_composed(a.project(hidden), a.input);
  return {output, expand_mean, expand_var, project_mean, project_var, expanded, projected};
}

FfnNormGradients ffn_norm_backward_composed(const at::Tensor& grad_output, const FfnNormArguments& a,
                                            const FfnNormSaved& saved) {
  a.check_backward(grad_output, saved);
  const at::Tensor hidden = conv_norm_output_composed(a.expand(), saved.expanded, saved.expand_mean, saved.expand_var)
                                .to(a.input.scalar_type());
  const auto [grad_hidden, grad_project, grad_project_norm_weight, grad_project_norm_bias] =
      conv_norm_backward_composed(grad_output, a.project(hidden), saved.projected, saved.project_mean,
                                  saved.project_var, true);
  const auto [grad_input, grad_expand, grad_expand_norm_weight, grad_expand_norm_bias] =
      conv_norm_backward_composed(grad_hidden, a.expand(), saved.expanded, saved.expand_mean, saved.expand_var, true);
  return {(grad_input + grad_output).contiguous(at::MemoryFormat::ChannelsLast),
          grad_expand,
          grad_expand_norm_weight,
          grad_expand_norm_bias,
          grad_project,
          grad_project_norm_weight,
          grad_project_norm_bias};
}

}  // namespace mobilemamba
