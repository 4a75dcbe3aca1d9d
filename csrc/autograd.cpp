// Gradients. Each backward pass is an operator of its own, so it has the same layers as a forward pass.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mobilemamba.h"
#include "ops/backbone.h"
#include "ops/kernel_of.h"
#include "ops/packed_conv2d.h"
#include "registration.h"

namespace mobilemamba::autograd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Calls the backend's kernel below autograd.
template <typename F, typename... Args>
auto below_autograd(F f, const Args&... args) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return f(args...);
}

/// The gradient of a residual, which is added last: `grad`, or undefined without a residual.
Tensor residual_gradient(AutogradContext* ctx, const Tensor& grad) {
  return ctx->saved_data["has_residual"].toBool() ? grad : Tensor();
}

/// backward(grad, saved...) as a list, for an operator with `count` saved tensors.
template <auto backward, size_t count>
variable_list gradients(const Tensor& grad, const variable_list& saved) {
  const auto call = [&]<size_t... i>(std::index_sequence<i...>) { return backward(grad, saved[i]...); };
  const auto to_list = [](const auto&... tensors) { return variable_list{tensors...}; };
  return std::apply(to_list, call(std::make_index_sequence<count>()));
}

struct Scan : torch::autograd::Function<Scan> {
  template <typename... Tensors>
  static Tensor forward(AutogradContext* ctx, const Tensors&... tensors) {
    ctx->save_for_backward({tensors...});
    return below_autograd(bidirectional_scan, tensors...);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return gradients<bidirectional_scan_backward, 8>(grads[0], ctx->get_saved_variables());
  }
};

struct Haar : torch::autograd::Function<Haar> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight) {
    ctx->save_for_backward({input, weight});
    return below_autograd(haar_conv2d, input, weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1];
    Tensor grad_input, grad_weight;
    // the transform is orthonormal, so the adjoint is the operator with the flipped kernel
    if (ctx->needs_input_grad(0)) grad_input = haar_conv2d(grads[0], weight.flip({2, 3}));
    if (ctx->needs_input_grad(1))
      grad_weight = haar_conv2d_backward_weight(grads[0], input, weight.size(3)).to(weight.scalar_type());
    return {grad_input, grad_weight};
  }
};

/// The weight's gradient is bilinear in grad_output and input, and haar_conv2d gives both of its derivatives.
struct HaarBackwardWeight : torch::autograd::Function<HaarBackwardWeight> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, int64_t kernel_size) {
    ctx->save_for_backward({grad_output, input});
    return below_autograd(haar_conv2d_backward_weight, grad_output, input, kernel_size);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    Tensor grad_grad_output, grad_input;
    if (ctx->needs_input_grad(0)) grad_grad_output = haar_conv2d(saved[1], grads[0]);
    if (ctx->needs_input_grad(1)) grad_input = haar_conv2d(saved[0], grads[0].flip({2, 3}));
    return {grad_grad_output, grad_input, Tensor()};
  }
};

struct Depthwise : torch::autograd::Function<Depthwise> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t stride,
                        std::string_view activation) {
    ctx->save_for_backward({input, weight, bias.value_or(Tensor())});
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["activation"] = std::string(activation);
    return below_autograd(depthwise_conv2d, input, weight, bias, residual, stride, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2];
    auto [grad_input, grad_weight, grad_bias] =
        depthwise_conv2d_backward(grads[0], input, weight, bias.defined() ? std::optional(bias) : std::nullopt,
                                  ctx->saved_data["stride"].toInt(), ctx->saved_data["activation"].toStringRef());
    return {grad_input,
            grad_weight.to(weight.scalar_type()),
            bias.defined() ? grad_bias.to(bias.scalar_type()) : Tensor(),
            residual_gradient(ctx, grads[0]),
            Tensor(),
            Tensor()};
  }
};

/// The gradients come from torch's own operators, so they can be differentiated again.
struct PackedConv : torch::autograd::Function<PackedConv> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Tensor& bias,
                        const std::optional<Tensor>& residual, int64_t kernel_size, int64_t stride,
                        std::string_view activation) {
    ctx->save_for_backward({input, weight, bias});
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["relu"] = activation == "relu";
    return below_autograd(packed_conv2d, input, weight, bias, residual, kernel_size, stride, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &packed = saved[1], &bias = saved[2];
    const int64_t kernel_size = ctx->saved_data["kernel_size"].toInt(), stride = ctx->saved_data["stride"].toInt();
    const int64_t pad = kernel_size / 2;
    const Tensor weight = unpack_conv2d_weight(packed, bias.size(0), input.size(1), kernel_size);
    Tensor grad = grads[0];
    if (ctx->saved_data["relu"].toBool())
      grad = at::threshold_backward(
          grad, below_autograd(packed_conv2d, input, packed, bias, std::nullopt, kernel_size, stride, "none"), 0);
    auto [grad_input, grad_weight, grad_bias] =
        at::convolution_backward(grad, input, weight, std::nullopt, {stride, stride}, {pad, pad}, {1, 1}, false, {0, 0},
                                 1, {ctx->needs_input_grad(0), ctx->needs_input_grad(1), false});
    return {grad_input,
            grad_weight.defined() ? pack_conv2d_weight(grad_weight) : Tensor(),
            ctx->needs_input_grad(2) ? grad.sum({0, 2, 3}).to(bias.scalar_type()) : Tensor(),
            residual_gradient(ctx, grads[0]),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

struct Ffn : torch::autograd::Function<Ffn> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& residual,
                        const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& project_weight,
                        const Tensor& project_bias) {
    ctx->save_for_backward({input, expand_weight, expand_bias, project_weight, project_bias});
    ctx->saved_data["has_residual"] = residual.has_value();
    return below_autograd(ffn, input, residual, expand_weight, expand_bias, project_weight, project_bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result = gradients<ffn_backward, 5>(grads[0], ctx->get_saved_variables());
    result.insert(result.begin() + 1, residual_gradient(ctx, grads[0]));
    return result;
  }
};

struct Mrffi : torch::autograd::Function<Mrffi> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& residual,
                        at::TensorList weights, double eps) {
    variable_list saved = {input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["eps"] = eps;
    return below_autograd(mrffi, input, residual, weights, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList weights = at::TensorList(saved).slice(1);
    auto [grad_input, grad_weights] = mrffi_backward(grads[0], saved[0], weights, ctx->saved_data["eps"].toDouble());
    variable_list result = {grad_input, residual_gradient(ctx, grads[0])};
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    result.emplace_back();
    return result;
  }
};

/// Where a gradient may be asked for, the layers' operators make the graph.
std::vector<Tensor> differentiable_backbone(const BackboneArguments& a) {
  const bool reverse = at::GradMode::is_enabled();
  const auto wanted = [&](const Tensor& x) { return (reverse && x.requires_grad()) || x._fw_grad(0).defined(); };
  if (wanted(a.input) || std::any_of(a.weights.begin(), a.weights.end(), wanted) ||
      (a.head_weight && wanted(*a.head_weight)) || (a.head_bias && wanted(*a.head_bias)))
    return backbone_composed(a);
  return below_autograd(backbone, a.input, a.weights, a.strides, a.depths, a.head_weight, a.head_bias, a.eps);
}

template <typename Function, typename Operator>
struct Differentiable;

template <typename Function, typename Result, typename... Args>
struct Differentiable<Function, Result (*)(Args...)> {
  static Result call(Args... args) { return Function::apply(args...); }
};

/// The autograd kernel of the operator `op` (its public function).
template <typename Function, auto op>
constexpr auto differentiable = &Differentiable<Function, decltype(op)>::call;

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(Autograd, m) {
  m.impl("backbone", kernel_of<backbone, differentiable_backbone>);
  m.impl("ffn", differentiable<Ffn, ffn>);
  m.impl("mrffi", differentiable<Mrffi, mrffi>);
  m.impl("bidirectional_scan", differentiable<Scan, bidirectional_scan>);
  m.impl("haar_conv2d", differentiable<Haar, haar_conv2d>);
  m.impl("haar_conv2d_backward_weight", differentiable<HaarBackwardWeight, haar_conv2d_backward_weight>);
  m.impl("depthwise_conv2d", differentiable<Depthwise, depthwise_conv2d>);
  m.impl("packed_conv2d", differentiable<PackedConv, packed_conv2d>);
  // a second derivative is refused where it is used; the first one may still be taken with create_graph=True
  for (const char* name :
       {"ffn_backward", "mrffi_backward", "bidirectional_scan_backward", "depthwise_conv2d_backward"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace mobilemamba::autograd
