// The autograd kernels of operators, made from their derivatives: in eager mode and inside torch.func's transforms.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>

namespace mobilemamba::autograd {

/// Hides torch.func's transforms from the check in torch::autograd::Function::apply, which refuses them because a
/// function could run any code at the level of one transform. The functions here only call an operator below autograd,
/// as torch's own kernels do, so nested transforms are right. `Function::forward` calls `restore` before it does so.
class HiddenTransforms {
 public:
  HiddenTransforms() : transforms_(std::move(at::functorch::functorchTLSAccessor())) {}
  HiddenTransforms(const HiddenTransforms&) = delete;
  HiddenTransforms& operator=(const HiddenTransforms&) = delete;
  ~HiddenTransforms() { restore(); }

  void restore() {
    if (transforms_) at::functorch::functorchTLSAccessor() = std::move(transforms_);
  }
  /// Whether gradients are recorded by the caller; the transforms outside of the innermost one still need it.
  bool grad_mode() const { return grad_mode_; }

 private:
  std::unique_ptr<at::functorch::FuncTorchTLSBase> transforms_;
  const bool grad_mode_ = at::GradMode::is_enabled();
};

/// Calls the kernels below autograd, with the caller's grad mode.
template <typename F>
auto below_autograd(const F& f, bool grad_mode) {
  const at::AutoGradMode mode(grad_mode);
  const at::AutoDispatchBelowADInplaceOrView below;
  return f();
}

template <typename Tensors>
void refuse_forward_mode(std::string_view op, const Tensors& tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefinedTensorList(tensors), op,
                              ": forward-mode derivatives (jvp, jacfwd, hessian) are not implemented; use reverse mode "
                              "(grad, vjp, jacrev)");
}

inline void refuse_forward_mode(std::string_view op, const at::Tensor& tensor) {
  refuse_forward_mode(op, at::TensorList(tensor));
}
inline void refuse_forward_mode(std::string_view op, const std::optional<at::Tensor>& tensor) {
  if (tensor) refuse_forward_mode(op, *tensor);
}
inline void refuse_forward_mode(std::string_view, int64_t) {}
inline void refuse_forward_mode(std::string_view, double) {}
inline void refuse_forward_mode(std::string_view, std::string_view) {}

/// The autograd kernel `call` of the operator with the public function `op`. `Derivative` has the operator's `name`,
/// `save(ctx, arguments...)` before the operator is called, and `gradients(ctx, grad)` of all arguments in their order.
template <typename Derivative, auto op, typename Operator = decltype(op)>
struct Differentiable;

template <typename Derivative, auto op, typename Result, typename... Args>
struct Differentiable<Derivative, op, Result (*)(Args...)>
    : torch::autograd::Function<Differentiable<Derivative, op, Result (*)(Args...)>> {
  static Result call(Args... args) {
    (refuse_forward_mode(Derivative::name, args), ...);
    HiddenTransforms transforms;
    return Differentiable::apply(args..., &transforms);
  }

  static Result forward(torch::autograd::AutogradContext* ctx, Args... args, HiddenTransforms* transforms) {
    Derivative::save(ctx, args...);
    transforms->restore();
    return below_autograd([&] { return op(args...); }, transforms->grad_mode());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list result = Derivative::gradients(ctx, grads[0]);
    result.emplace_back();  // of `transforms`
    return result;
  }
};

}  // namespace mobilemamba::autograd
