// Gradients. The backward passes are operators of their own, so that every backend repeats the same pattern.
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include "mobilemamba.h"
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

struct Scan : torch::autograd::Function<Scan> {
  static Tensor forward(AutogradContext* ctx, const Tensor& u, const Tensor& delta, const Tensor& A_log,
                        const Tensor& B, const Tensor& C, const Tensor& D, const Tensor& dt_weight,
                        const Tensor& dt_bias) {
    ctx->save_for_backward({u, delta, A_log, B, C, D, dt_weight, dt_bias});
    return below_autograd(bidirectional_scan, u, delta, A_log, B, C, D, dt_weight, dt_bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list s = ctx->get_saved_variables();
    auto [u, delta, A_log, B, C, D, dt_weight, dt_bias] =
        bidirectional_scan_backward(grads[0], s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]);
    return {u, delta, A_log, B, C, D, dt_weight, dt_bias};
  }
};

/// Gradients of gradients are refused where they would be used, not where the first gradient is taken.
struct ScanBackward : torch::autograd::Function<ScanBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad_y, const Tensor& u, const Tensor& delta,
                               const Tensor& A_log, const Tensor& B, const Tensor& C, const Tensor& D,
                               const Tensor& dt_weight, const Tensor& dt_bias) {
    auto [grad_u, grad_delta, grad_A_log, grad_B, grad_C, grad_D, grad_dt_weight, grad_dt_bias] =
        below_autograd(bidirectional_scan_backward, grad_y, u, delta, A_log, B, C, D, dt_weight, dt_bias);
    return {grad_u, grad_delta, grad_A_log, grad_B, grad_C, grad_D, grad_dt_weight, grad_dt_bias};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "bidirectional_scan: second derivatives are not available, only the first");
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
    // the transform is orthonormal, so the adjoint differs from the operator only in the flipped kernel
    if (ctx->needs_input_grad(0)) grad_input = haar_conv2d(grads[0], weight.flip({2, 3}));
    if (ctx->needs_input_grad(1))
      grad_weight = haar_conv2d_backward_weight(grads[0], input, weight.size(3)).to(weight.scalar_type());
    return {grad_input, grad_weight};
  }
};

/// Bilinear like haar_conv2d, and the same function with its arguments exchanged.
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
            ctx->saved_data["has_residual"].toBool() ? grads[0] : Tensor(),
            Tensor(),
            Tensor()};
  }
};

struct DepthwiseBackward : torch::autograd::Function<DepthwiseBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                               const std::optional<Tensor>& bias, int64_t stride, std::string_view activation) {
    auto [grad_input, grad_weight, grad_bias] =
        below_autograd(depthwise_conv2d_backward, grad_output, input, weight, bias, stride, activation);
    return {grad_input, grad_weight, grad_bias};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "depthwise_conv2d: second derivatives are not available, only the first");
  }
};

/// The gradients are torch's own, differentiable themselves.
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
      grad = at::threshold_backward(grad, at::conv2d(input, weight, bias.to(input.scalar_type()), stride, pad), 0);
    auto [grad_input, grad_weight, grad_bias] =
        at::convolution_backward(grad, input, weight, std::nullopt, {stride, stride}, {pad, pad}, {1, 1}, false, {0, 0},
                                 1, {ctx->needs_input_grad(0), ctx->needs_input_grad(1), false});
    return {grad_input,
            grad_weight.defined() ? pack_conv2d_weight(grad_weight) : Tensor(),
            ctx->needs_input_grad(2) ? grad.sum({0, 2, 3}).to(bias.scalar_type()) : Tensor(),
            ctx->saved_data["has_residual"].toBool() ? grads[0] : Tensor(),
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
    const variable_list s = ctx->get_saved_variables();
    auto [grad_input, grad_expand_weight, grad_expand_bias, grad_project_weight, grad_project_bias] =
        ffn_backward(grads[0], s[0], s[1], s[2], s[3], s[4]);
    return {grad_input,          ctx->saved_data["has_residual"].toBool() ? grads[0] : Tensor(),
            grad_expand_weight,  grad_expand_bias,
            grad_project_weight, grad_project_bias};
  }
};

struct FfnBackward : torch::autograd::Function<FfnBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad_output, const Tensor& input,
                               const Tensor& expand_weight, const Tensor& expand_bias, const Tensor& project_weight,
                               const Tensor& project_bias) {
    auto [grad_input, grad_expand_weight, grad_expand_bias, grad_project_weight, grad_project_bias] =
        below_autograd(ffn_backward, grad_output, input, expand_weight, expand_bias, project_weight, project_bias);
    return {grad_input, grad_expand_weight, grad_expand_bias, grad_project_weight, grad_project_bias};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "ffn: second derivatives are not available, only the first");
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
    variable_list result = {grad_input, ctx->saved_data["has_residual"].toBool() ? grads[0] : Tensor()};
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    result.emplace_back();
    return result;
  }
};

struct MrffiBackward : torch::autograd::Function<MrffiBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad_output, const Tensor& input, at::TensorList weights,
                               double eps) {
    auto [grad_input, grad_weights] = below_autograd(mrffi_backward, grad_output, input, weights, eps);
    variable_list result = {grad_input};
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    return result;
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "mrffi: second derivatives are not available, only the first");
  }
};

Tensor feed_forward(const Tensor& input, const std::optional<Tensor>& residual, const Tensor& expand_weight,
                    const Tensor& expand_bias, const Tensor& project_weight, const Tensor& project_bias) {
  return Ffn::apply(input, residual, expand_weight, expand_bias, project_weight, project_bias);
}

FfnGradients feed_forward_backward(const Tensor& grad_output, const Tensor& input, const Tensor& expand_weight,
                                   const Tensor& expand_bias, const Tensor& project_weight,
                                   const Tensor& project_bias) {
  const variable_list g =
      FfnBackward::apply(grad_output, input, expand_weight, expand_bias, project_weight, project_bias);
  return {g[0], g[1], g[2], g[3], g[4]};
}

Tensor mixer(const Tensor& input, const std::optional<Tensor>& residual, at::TensorList weights, double eps) {
  return Mrffi::apply(input, residual, weights, eps);
}

std::tuple<Tensor, std::vector<Tensor>> mixer_backward(const Tensor& grad_output, const Tensor& input,
                                                       at::TensorList weights, double eps) {
  const variable_list g = MrffiBackward::apply(grad_output, input, weights, eps);
  return {g[0], {g.begin() + 1, g.end()}};
}

Tensor scan(const Tensor& u, const Tensor& delta, const Tensor& A_log, const Tensor& B, const Tensor& C,
            const Tensor& D, const Tensor& dt_weight, const Tensor& dt_bias) {
  return Scan::apply(u, delta, A_log, B, C, D, dt_weight, dt_bias);
}

ScanGradients scan_backward(const Tensor& grad_y, const Tensor& u, const Tensor& delta, const Tensor& A_log,
                            const Tensor& B, const Tensor& C, const Tensor& D, const Tensor& dt_weight,
                            const Tensor& dt_bias) {
  const variable_list g = ScanBackward::apply(grad_y, u, delta, A_log, B, C, D, dt_weight, dt_bias);
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
}

Tensor haar(const Tensor& input, const Tensor& weight) {
  return Haar::apply(input, weight);
}

Tensor haar_backward_weight(const Tensor& grad_output, const Tensor& input, int64_t kernel_size) {
  return HaarBackwardWeight::apply(grad_output, input, kernel_size);
}

Tensor depthwise(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, int64_t stride, std::string_view activation) {
  return Depthwise::apply(input, weight, bias, residual, stride, activation);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Tensor& grad_output, const Tensor& input,
                                                      const Tensor& weight, const std::optional<Tensor>& bias,
                                                      int64_t stride, std::string_view activation) {
  const variable_list g = DepthwiseBackward::apply(grad_output, input, weight, bias, stride, activation);
  return {g[0], g[1], g[2]};
}

Tensor packed_conv(const Tensor& input, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
                   int64_t kernel_size, int64_t stride, std::string_view activation) {
  return PackedConv::apply(input, weight, bias, residual, kernel_size, stride, activation);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(Autograd, m) {
  m.impl("ffn", feed_forward);
  m.impl("ffn_backward", feed_forward_backward);
  m.impl("mrffi", mixer);
  m.impl("mrffi_backward", mixer_backward);
  m.impl("bidirectional_scan", scan);
  m.impl("bidirectional_scan_backward", scan_backward);
  m.impl("haar_conv2d", haar);
  m.impl("haar_conv2d_backward_weight", haar_backward_weight);
  m.impl("depthwise_conv2d", depthwise);
  m.impl("depthwise_conv2d_backward", depthwise_backward);
  m.impl("packed_conv2d", packed_conv);
}

}  // namespace mobilemamba::autograd
