// Gradients. Each backward pass is an operator of its own, so it has the same layers as a forward pass.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros_like.h>

#include "differentiable.h"
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

/// The gradient of a residual, which is added last: `grad`, or undefined without a residual.
Tensor residual_gradient(AutogradContext* ctx, const Tensor& grad) {
  return ctx->saved_data["has_residual"].toBool() ? grad : Tensor();
}

/// backward(grad, saved...) as a list, for an operator with `count` saved tensors.
template <auto backward, size_t count>
variable_list gradients_by(const Tensor& grad, const variable_list& saved) {
  const auto call = [&]<size_t... i>(std::index_sequence<i...>) { return backward(grad, saved[i]...); };
  const auto to_list = [](const auto&... tensors) { return variable_list{tensors...}; };
  return std::apply(to_list, call(std::make_index_sequence<count>()));
}

struct Scan {
  static constexpr const char* name = "bidirectional_scan";

  template <typename... Tensors>
  static void save(AutogradContext* ctx, const Tensors&... tensors) {
    ctx->save_for_backward({tensors...});
  }

  static variable_list gradients(AutogradContext* ctx, const Tensor& grad) {
    return gradients_by<bidirectional_scan_backward, 8>(grad, ctx->get_saved_variables());
  }
};

struct Haar {
  static constexpr const char* name = "haar_conv2d";

  static void save(AutogradContext* ctx, const Tensor& input, const Tensor& weight) {
    ctx->save_for_backward({input, weight});
  }

  static variable_list gradients(AutogradContext* ctx, const Tensor& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1];
    Tensor grad_input, grad_weight;
    // the transform is orthonormal, so the adjoint is the operator with the flipped kernel
    if (ctx->needs_input_grad(0)) grad_input = haar_conv2d(grad, weight.flip({2, 3}));
    if (ctx->needs_input_grad(1))
      grad_weight = haar_conv2d_backward_weight(grad, input, weight.size(3)).to(weight.scalar_type());
    return {grad_input, grad_weight};
  }
};

/// The weight's gradient is bilinear in grad_output and input, and haar_conv2d gives both of its derivatives.
struct HaarBackwardWeight {
  static constexpr const char* name = "haar_conv2d_backward_weight";

  static void save(AutogradContext* ctx, const Tensor& grad_output, const Tensor& input, int64_t) {
    ctx->save_for_backward({grad_output, input});
  }

  static variable_list gradients(AutogradContext* ctx, const Tensor& grad) {
    const variable_list saved = ctx->get_saved_variables();
    Tensor grad_grad_output, grad_input;
    if (ctx->needs_input_grad(0)) grad_grad_output = haar_conv2d(saved[1], grad);
    if (ctx->needs_input_grad(1)) grad_input = haar_conv2d(saved[0], grad.flip({2, 3}));
    return {grad_grad_output, grad_input, Tensor()};
  }
};

struct Depthwise {
  static constexpr const char* name = "depthwise_conv2d";

  static void save(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, int64_t stride, std::string_view activation) {
    ctx->save_for_backward({input, weight, bias.value_or(Tensor())});
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["activation"] = std::string(activation);
  }

  static variable_list gradients(AutogradContext* ctx, const Tensor& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], &bias = saved[2];
    auto [grad_input, grad_weight, grad_bias] =
        depthwise_conv2d_backward(grad, input, weight, bias.defined() ? std::optional(bias) : std::nullopt,
                                  ctx->saved_data["stride"].toInt(), ctx->saved_data["activation"].toStringRef());
    return {grad_input,
            grad_weight.to(weight.scalar_type()),
            bias.defined() ? grad_bias.to(bias.scalar_type()) : Tensor(),
            residual_gradient(ctx, grad),
            Tensor(),
            Tensor()};
  }
};

/// Keeps the convolution's output, unless it is depthwise, and no result of the norm or the activation.
struct ConvNorm : torch::autograd::Function<ConvNorm> {
  static ConvNormResult call(const Tensor& input, const Tensor& weight, const Tensor& norm_weight,
                             const Tensor& norm_bias, const std::optional<Tensor>& residual, int64_t stride,
                             std::string_view activation, double eps) {
    for (const Tensor& x : {input, weight, norm_weight, norm_bias})
      refuse_forward_mode("conv_norm", x);
    refuse_forward_mode("conv_norm", residual);
    HiddenTransforms transforms;
    const variable_list results =
        ConvNorm::apply(input, weight, norm_weight, norm_bias, residual, stride, activation, eps, &transforms);
    return {results[0], results[1], results[2], results[3]};
  }

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                               const Tensor& norm_weight, const Tensor& norm_bias,
                               const std::optional<Tensor>& residual, int64_t stride, std::string_view activation,
                               double eps, HiddenTransforms* transforms) {
    transforms->restore();
    const auto call = [&] {
      return conv_norm(input, weight, norm_weight, norm_bias, residual, stride, activation, eps);
    };
    const auto [output, mean, var, convolved] = below_autograd(call, transforms->grad_mode());
    ctx->save_for_backward({input, weight, norm_weight, norm_bias, convolved, mean, var});
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["eps"] = eps;
    ctx->mark_non_differentiable({mean, var, convolved});
    ctx->set_materialize_grads(false);  // of these three
    return {output, mean, var, convolved};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(9);
    const variable_list saved = ctx->get_saved_variables();
    auto [grad_input, grad_weight, grad_norm_weight, grad_norm_bias] =
        conv_norm_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6],
                           ctx->saved_data["stride"].toInt(), ctx->saved_data["activation"].toStringRef(),
                           ctx->saved_data["eps"].toDouble(), ctx->needs_input_grad(0));
    return {ctx->needs_input_grad(0) ? grad_input : Tensor(),
            grad_weight,
            grad_norm_weight,
            grad_norm_bias,
            residual_gradient(ctx, grads[0]),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

/// Keeps the products before their norms, and no result of a norm or an activation.
struct FfnNorm : torch::autograd::Function<FfnNorm> {
  static FfnNormResult call(const Tensor& input, const Tensor& expand_weight, const Tensor& expand_norm_weight,
                            const Tensor& expand_norm_bias, const Tensor& project_weight,
                            const Tensor& project_norm_weight, const Tensor& project_norm_bias, double expand_eps,
                            double project_eps) {
    const variable_list inputs = {input,          expand_weight,       expand_norm_weight, expand_norm_bias,
                                  project_weight, project_norm_weight, project_norm_bias};
    refuse_forward_mode("ffn_norm", inputs);
    HiddenTransforms transforms;
    const variable_list r = FfnNorm::apply(at::TensorList(inputs), expand_eps, project_eps, &transforms);
    return {r[0], r[1], r[2], r[3], r[4], r[5], r[6]};
  }

  static variable_list forward(AutogradContext* ctx, at::TensorList inputs, double expand_eps, double project_eps,
                               HiddenTransforms* transforms) {
    transforms->restore();
    const auto call = [&] {
      return ffn_norm(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], inputs[5], inputs[6], expand_eps,
                      project_eps);
    };
    const auto [output, expand_mean, expand_var, project_mean, project_var, expanded, projected] =
        below_autograd(call, transforms->grad_mode());
    variable_list saved = inputs.vec();
    saved.insert(saved.end(), {expanded, projected, expand_mean, expand_var, project_mean, project_var});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["expand_eps"] = expand_eps;
    ctx->saved_data["project_eps"] = project_eps;
    ctx->mark_non_differentiable({expand_mean, expand_var, project_mean, project_var, expanded, projected});
    ctx->set_materialize_grads(false);  // of these six
    return {output, expand_mean, expand_var, project_mean, project_var, expanded, projected};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    constexpr size_t inputs = 7;
    if (!grads[0].defined()) return variable_list(inputs + 3);
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList all(saved);
    const auto gradients =
        ffn_norm_backward(grads[0], saved[0], all.slice(1, inputs - 1), all.slice(inputs),
                          ctx->saved_data["expand_eps"].toDouble(), ctx->saved_data["project_eps"].toDouble());
    variable_list result = std::apply([](const auto&... gradient) { return variable_list{gradient...}; }, gradients);
    result.resize(inputs + 3);  // of the epsilons and the transforms
    return result;
  }
};

/// The gradients come from torch's own operators, so they can be differentiated again.
struct PackedConv {
  static constexpr const char* name = "packed_conv2d";

  static void save(AutogradContext* ctx, const Tensor& input, const Tensor& weight, const Tensor& bias,
                   const std::optional<Tensor>& residual, int64_t kernel_size, int64_t stride,
                   std::string_view activation) {
    ctx->save_for_backward({input, weight, bias});
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["kernel_size"] = kernel_size;
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["relu"] = activation == "relu";
  }

  static variable_list gradients(AutogradContext* ctx, const Tensor& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &input = saved[0], &packed = saved[1], &bias = saved[2];
    if (TORCH_GUARD_OR_FALSE(input.sym_numel().sym_eq(0)))  // torch's convolution refuses a height or width of 0
      return {at::zeros_like(input),
              at::zeros_like(packed),
              at::zeros_like(bias),
              residual_gradient(ctx, grad),
              Tensor(),
              Tensor(),
              Tensor()};
    const int64_t kernel_size = ctx->saved_data["kernel_size"].toInt(), stride = ctx->saved_data["stride"].toInt();
    const int64_t pad = kernel_size / 2;
    const Tensor weight = unpack_conv2d_weight(packed, bias.size(0), input.size(1), kernel_size);
    Tensor grad_sums = grad;
    if (ctx->saved_data["relu"].toBool()) {
      const auto sums = [&] { return packed_conv2d(input, packed, bias, std::nullopt, kernel_size, stride, "none"); };
      grad_sums = at::threshold_backward(grad, below_autograd(sums, at::GradMode::is_enabled()), 0);
    }
    auto [grad_input, grad_weight, grad_bias] =
        at::convolution_backward(grad_sums, input, weight, std::nullopt, {stride, stride}, {pad, pad}, {1, 1}, false,
                                 {0, 0}, 1, {ctx->needs_input_grad(0), ctx->needs_input_grad(1), false});
    return {grad_input,
            grad_weight.defined() ? pack_conv2d_weight(grad_weight) : Tensor(),
            ctx->needs_input_grad(2) ? grad_sums.sum({0, 2, 3}).to(bias.scalar_type()) : Tensor(),
            residual_gradient(ctx, grad),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

struct Ffn {
  static constexpr const char* name = "ffn";

  static void save(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& residual,
                   const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& project_weight,
                   const Tensor& project_bias) {
    ctx->save_for_backward({input, expand_weight, expand_bias, project_weight, project_bias});
    ctx->saved_data["has_residual"] = residual.has_value();
  }

  static variable_list gradients(AutogradContext* ctx, const Tensor& grad) {
    variable_list result = gradients_by<ffn_backward, 5>(grad, ctx->get_saved_variables());
    result.insert(result.begin() + 1, residual_gradient(ctx, grad));
    return result;
  }
};

struct Mrffi {
  static constexpr const char* name = "mrffi";

  static void save(AutogradContext* ctx, const Tensor& input, const std::optional<Tensor>& residual,
                   at::TensorList weights, double eps) {
    variable_list saved = {input};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["eps"] = eps;
  }

  static variable_list gradients(AutogradContext* ctx, const Tensor& grad) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList weights = at::TensorList(saved).slice(1);
    auto [grad_input, grad_weights] = mrffi_backward(grad, saved[0], weights, ctx->saved_data["eps"].toDouble());
    variable_list result = {grad_input, residual_gradient(ctx, grad)};
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
  const auto call = [&] {
    return backbone(a.input, a.weights, a.strides, a.depths, a.head_weight, a.head_bias, a.eps);
  };
  return below_autograd(call, reverse);
}

variable_list tensors_of(c10::ArrayRef<c10::IValue> values) {
  variable_list tensors;
  for (const c10::IValue& value : values) {
    if (value.isTensor()) tensors.push_back(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& tensor : value.toTensorVector())
        tensors.push_back(tensor);
  }
  return tensors;
}

/// A function of tensors that has no derivative.
struct Refused : torch::autograd::Function<Refused> {
  static variable_list forward(AutogradContext* ctx, at::TensorList, const std::string& op,
                               c10::function_ref<variable_list()> compute, HiddenTransforms* transforms) {
    ctx->saved_data["operator"] = op;
    transforms->restore();
    return below_autograd(compute, transforms->grad_mode());
  }

  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, ctx->saved_data["operator"].toStringRef(),
                                ": second derivatives are not implemented; the operator is differentiable once");
  }
};

/// The autograd kernel of a backward operator, "NAME_backward", that is not differentiable itself. A second derivative
/// is refused where it is taken, so the first one can be computed with create_graph=True.
void refuse_second_derivative(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string& full = schema.name();  // "mobilemamba::NAME_backward"
  const size_t begin = full.find("::") + 2, end = full.rfind("_backward");
  const std::string name = full.substr(begin, end - begin);
  const variable_list inputs = tensors_of(torch::jit::last(*stack, schema.arguments().size()));
  refuse_forward_mode(name, inputs);
  HiddenTransforms transforms;
  Refused::apply(
      at::TensorList(inputs), name,
      [&] {
        op.callBoxed(stack);
        return tensors_of(torch::jit::last(*stack, schema.returns().size()));
      },
      &transforms);  // sets the history of the tensors on the stack
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(Autograd, m) {
  m.impl("backbone", kernel_of<backbone, differentiable_backbone>);
  m.impl("ffn", Differentiable<Ffn, ffn>::call);
  m.impl("mrffi", Differentiable<Mrffi, mrffi>::call);
  m.impl("bidirectional_scan", Differentiable<Scan, bidirectional_scan>::call);
  m.impl("haar_conv2d", Differentiable<Haar, haar_conv2d>::call);
  m.impl("haar_conv2d_backward_weight", Differentiable<HaarBackwardWeight, haar_conv2d_backward_weight>::call);
  m.impl("depthwise_conv2d", Differentiable<Depthwise, depthwise_conv2d>::call);
  m.impl("conv_norm", ConvNorm::call);
  m.impl("ffn_norm", FfnNorm::call);
  m.impl("packed_conv2d", Differentiable<PackedConv, packed_conv2d>::call);
  for (const char* name : {"ffn_backward", "mrffi_backward", "bidirectional_scan_backward", "depthwise_conv2d_backward",
                           "conv_norm_backward", "ffn_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<refuse_second_derivative>());
}

}  // namespace mobilemamba::autograd
