// The feed-forward layer in training on the CPU. Between the two products are the norm and the ReLU of some rows at a
// time, so the hidden activations after them are never in memory, neither forward nor backward.
#include "ops/ffn_norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "cpu/norm_product.h"
#include "cpu/run.h"
#include "ops/common.h"
#include "ops/kernel_of.h"
#include "ops/matrix.h"
#include "registration.h"

namespace mobilemamba::cpu {
namespace {

/// The matrices of the two products, and their rows in parts.
struct Products {
  at::Tensor x, expand_weight, project_weight;
  int64_t rows, channels, hidden;
  Parts parts;

  Products(const FfnNormArguments& a, const at::Tensor& input)
      : x(positions(input)),
        expand_weight(a.expand_weight.flatten(1).contiguous()),
        project_weight(a.project_weight.flatten(1).contiguous()),
        rows(x.size(0)),
        channels(x.size(1)),
        hidden(expand_weight.size(0)),
        parts(rows, channels, hidden,
              std::max(NormLayout(x.scalar_type(), rows, channels).part_rows(),
                       NormLayout(x.scalar_type(), rows, hidden).part_rows())) {}

  /// Bytes of a part's rows with `columns` columns, rounded up to a cache line.
  size_t bytes(int64_t columns) const { return ceil_div(parts.largest() * columns * x.element_size(), 64) * 64; }
  at::Tensor matrix(std::byte* memory, int64_t size, int64_t columns) const {
    return at::from_blob(memory, {size, columns}, x.options());
  }
};

FfnNormResult ffn_norm_forward(const FfnNormArguments& a) {
  a.check();
  const at::Tensor input = a.input.contiguous(at::MemoryFormat::ChannelsLast);
  const Products p(a, input);
  const at::Tensor expanded = a.hidden(), projected = empty_image(input), output = empty_image(input);

  const auto x_of = [&](int64_t first, int64_t size, std::byte*) { return p.x.narrow(0, first, size); };
  const auto expand_moments = multiply(p.parts, 0, x_of, p.expand_weight, positions(expanded));
  const Norm expand_norm(positions(expanded), expand_moments, a.expand_norm_weight, a.expand_norm_bias, a.expand_eps,
                         Activation::relu, p.rows);
  const auto hidden_of = [&](int64_t first, int64_t size, std::byte* scratch) {
    run_here(kernels().norm_forward, expand_norm.forward(first, size, nullptr, scratch));
    return p.matrix(scratch, size, p.hidden);
  };
  const auto project_moments = multiply(p.parts, p.bytes(p.hidden), hidden_of, p.project_weight, positions(projected));
  const Norm project_norm(positions(projected), project_moments, a.project_norm_weight, a.project_norm_bias,
                          a.project_eps, Activation::none, p.rows);
  run(kernels().norm_forward, project_norm.forward(0, p.rows, input.const_data_ptr(), output.mutable_data_ptr()));

  const NormLayout &expand = expand_norm.layout(), &project = project_norm.layout();
  return {output,
          expand.to_tensor(expand_moments.mean),
          expand.to_tensor(expand_moments.var),
          project.to_tensor(project_moments.mean),
          project.to_tensor(project_moments.var),
          expanded,
          projected};
}

FfnNormGradients ffn_norm_gradients(const at::Tensor& grad_output, const FfnNormArguments& a,
                                    const FfnNormSaved& saved) {
  a.check_backward(grad_output, saved);
  const auto channels_last = [](const at::Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); };
  const at::Tensor input = channels_last(a.input), grad_image = channels_last(grad_output);
  const at::Tensor grad = positions(grad_image), expanded = channels_last(saved.expanded);
  const at::Tensor projected = channels_last(saved.projected), grad_input = empty_image(input);
  const Products p(a, input);
  Norm expand_norm(positions(expanded), {channels_of(saved.expand_mean), channels_of(saved.expand_var)},
                   a.expand_norm_weight, a.expand_norm_bias, a.expand_eps, Activation::relu, p.rows);
  Norm project_norm(positions(projected), {channels_of(saved.project_mean), channels_of(saved.project_var)},
                    a.project_norm_weight, a.project_norm_bias, a.project_eps, Activation::none, p.rows);

  const at::Tensor project_sums = project_norm.layout().sums(p.rows), expand_sums = expand_norm.layout().sums(p.rows);
  run(kernels().norm_backward_sums, project_norm.backward_sums(0, p.rows, grad, project_sums));
  project_norm.solve(project_sums);

  const at::Tensor grad_hidden = at::empty({p.rows, p.hidden}, p.x.options());
  const ProductWeight expand(p.expand_weight), project(p.project_weight);
  const auto project_rows = [&](int64_t first, int64_t size, std::byte* scratch) -> ProductRows {
    std::byte* const hidden = scratch + p.bytes(p.channels);
    run_here(kernels().norm_backward_input, project_norm.backward_input(first, size, grad, scratch));
    const at::Tensor grad_projected = p.matrix(scratch, size, p.channels);
    input_gradient(grad_projected, project, first, grad_hidden);
    run_here(kernels().norm_backward_sums, expand_norm.backward_sums(first, size, grad_hidden, expand_sums));
    run_here(kernels().norm_forward, expand_norm.forward(first, size, nullptr, hidden));
    return {grad_projected, p.matrix(hidden, size, p.hidden)};
  };
  const at::Tensor grad_project =
      weight_gradient(p.parts, p.bytes(p.channels) + p.bytes(p.hidden), project_rows, p.project_weight);
  expand_norm.solve(expand_sums);

  const auto expand_rows = [&](int64_t first, int64_t size, std::byte* scratch) -> ProductRows {
    run_here(kernels().norm_backward_input, expand_norm.backward_input(first, size, grad_hidden, scratch));
    const at::Tensor grad_expanded = p.matrix(scratch, size, p.hidden);
    input_gradient(grad_expanded, expand, first, positions(grad_input), grad);
    return {grad_expanded, p.x.narrow(0, first, size)};
  };
  const at::Tensor grad_expand = weight_gradient(p.parts, p.bytes(p.hidden), expand_rows, p.expand_weight);
  return {grad_input,
          parameter_gradient(grad_expand, a.expand_weight),
          parameter_gradient(expand_norm.grad_weight(), a.expand_norm_weight),
          parameter_gradient(expand_norm.grad_bias(), a.expand_norm_bias),
          parameter_gradient(grad_project, a.project_weight),
          parameter_gradient(project_norm.grad_weight(), a.project_norm_weight),
          parameter_gradient(project_norm.grad_bias(), a.project_norm_bias)};
}

FfnNormGradients ffn_norm_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                       at::TensorList parameters, at::TensorList saved, double expand_eps,
                                       double project_eps) {
  return ffn_norm_gradients(grad_output, ffn_norm_arguments(input, parameters, expand_eps, project_eps),
                            FfnNormSaved(saved));
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("ffn_norm", kernel_of<ffn_norm, ffn_norm_forward>);
  m.impl("ffn_norm_backward", ffn_norm_backward_cpu);
}

}  // namespace mobilemamba::cpu
