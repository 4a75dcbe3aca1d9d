// Backward operators that are not differentiable; see the header.
#include "differentiable.h"

#include <torch/library.h>

namespace mobilemamba::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

}  // namespace

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

}  // namespace mobilemamba::autograd
