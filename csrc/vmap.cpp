// The operators inside torch.vmap. If it maps images only, the mapped dimension joins their batch, and the operator is
// called once. Otherwise the operator is called for each index of the mapped dimension.
#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/ops/stack.h>

#include <algorithm>

#include "registration.h"

namespace mobilemamba::vmap {
namespace {

using at::Tensor;
using Values = std::vector<c10::IValue>;

/// An argument that has the batch as its first dimension.
struct Images {
  std::string_view name;
  int64_t dimensions;
};
constexpr Images images[] = {{"input", 4}, {"residual", 4}, {"u", 3}, {"delta", 4}, {"B", 4}, {"C", 4}};

/// The innermost vmap that maps `x`, counted from the outermost transform; 0: none.
int64_t level_of(const Tensor& x) {
  const auto* batched = at::functorch::maybeGetBatchedImpl(x);
  return batched ? batched->level() : 0;
}

/// A tensor outside of the vmap `level`. The mapped dimension, if it has one, is the first.
struct Unwrapped {
  Tensor tensor;
  bool mapped;

  Unwrapped(const Tensor& x, int64_t level) : tensor(x), mapped(level_of(x) == level) {
    if (!mapped) return;
    const auto* batched = at::functorch::maybeGetBatchedImpl(x);
    tensor = batched->value().movedim(batched->bdim(), 0);
  }
};

/// `value`, a tensor or a list of them, with f(tensor) in place of each tensor. Other values stay as they are.
template <typename F>
c10::IValue each_tensor(const c10::IValue& value, const F& f) {
  if (value.isTensor() && value.toTensor().defined()) return f(value.toTensor());
  if (!value.isTensorList()) return value;
  std::vector<Tensor> tensors = value.toTensorVector();
  std::ranges::transform(tensors, tensors.begin(), f);
  return tensors;
}

/// One call of an operator inside a vmap: the innermost that maps any of its tensors.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op_(op), arguments_(torch::jit::pop(stack, op.schema().arguments().size())) {
    for (const c10::IValue& argument : arguments_)
      each_tensor(argument, [&](const Tensor& x) {
        level_ = std::max(level_, level_of(x));
        return x;
      });
    for (size_t i = 0; i < arguments_.size(); ++i)
      each_tensor(arguments_[i], [&](const Tensor& x) {
        inspect(Unwrapped(x, level_), images_at(i));
        return x;
      });
  }

  /// Whether only images are mapped, and all of the arguments have the same batch.
  bool maps_images_only() const { return images_only_; }

  Values with_larger_batch() const {
    Values arguments = arguments_;
    for (size_t i = 0; i < arguments.size(); ++i)
      if (images_at(i))
        arguments[i] = each_tensor(arguments[i], [&](const Tensor& x) {
          const Unwrapped all(x, level_);
          if (all.mapped) return all.tensor.flatten(0, 1);
          std::vector<c10::SymInt> sizes(x.sym_sizes().begin(), x.sym_sizes().end());
          sizes.insert(sizes.begin(), *count_);
          return x.expand_symint(sizes).flatten(0, 1);
        });
    Values results = call(std::move(arguments));
    for (c10::IValue& result : results)
      result = each_tensor(result, [&](const Tensor& y) { return wrap(y.unflatten_symint(0, {*count_, *batch_})); });
    return results;
  }

  Values one_after_another() const {
    const int64_t count = count_->guard_int(__FILE__, __LINE__);
    TORCH_CHECK(count > 0, op_.schema().name(), ": torch.vmap maps a dimension of size 0, expected at least 1");
    std::vector<Values> results;
    for (int64_t i = 0; i < count; ++i) {
      Values arguments = arguments_;
      for (c10::IValue& argument : arguments)
        argument = each_tensor(argument, [&](const Tensor& x) {
          const Unwrapped all(x, level_);
          return all.mapped ? all.tensor.select(0, i) : all.tensor;
        });
      results.push_back(call(std::move(arguments)));
    }
    Values stacked = results[0];
    for (size_t r = 0; r < stacked.size(); ++r) {
      size_t position = 0;
      stacked[r] = each_tensor(stacked[r], [&](const Tensor&) {
        std::vector<Tensor> tensors;
        for (const Values& values : results)
          tensors.push_back(values[r].isTensor() ? values[r].toTensor() : values[r].toTensorVector()[position]);
        ++position;
        return wrap(stack(tensors));
      });
    }
    return stacked;
  }

 private:
  const Images* images_at(size_t argument) const {
    const auto found = std::ranges::find(images, op_.schema().arguments()[argument].name(), &Images::name);
    return found == std::end(images) ? nullptr : found;
  }

  void inspect(const Unwrapped& x, const Images* expected) {
    if (x.mapped) count_ = x.tensor.sym_size(0);
    if (expected && x.tensor.dim() == expected->dimensions + x.mapped) {
      const c10::SymInt batch = x.tensor.sym_size(x.mapped);
      if (!batch_) batch_ = batch;
      if (batch == *batch_) return;
    }
    if (x.mapped || expected) images_only_ = false;
  }

  Values call(Values arguments) const {
    op_.callBoxed(arguments);
    return arguments;
  }

  Tensor wrap(const Tensor& x) const { return at::functorch::makeBatched(x, 0, level_); }

  /// Keeps channels last in memory.
  static Tensor stack(const std::vector<Tensor>& tensors) {
    const Tensor& first = tensors[0];
    if (first.dim() < 3 || first.sym_stride(1).maybe_as_int() != 1) return at::stack(tensors);
    std::vector<Tensor> last;
    for (const Tensor& tensor : tensors)
      last.push_back(tensor.movedim(1, -1));
    return at::stack(last).movedim(-1, 2);
  }

  const c10::OperatorHandle& op_;
  const Values arguments_;
  int64_t level_ = 0;
  std::optional<c10::SymInt> count_, batch_;  // of the mapped dimension; of the images
  bool images_only_ = true;
};

/// The kernel of an operator. `joins_batch`: its results have the batch as their first dimension, and no image depends
/// on another.
template <bool joins_batch>
void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard outside(c10::DispatchKey::FuncTorchBatched);
  const Call call(op, *stack);
  const Values results = joins_batch && call.maps_images_only() ? call.with_larger_batch() : call.one_after_another();
  stack->insert(stack->end(), results.begin(), results.end());
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(FuncTorchBatched, m) {
  for (const char* name : {"bidirectional_scan", "haar_conv2d", "depthwise_conv2d", "packed_conv2d", "ffn", "mrffi",
                           "patch_embedding", "patch_merging", "backbone"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<kernel<true>>());
  for (const char* name : {"bidirectional_scan_backward", "haar_conv2d_backward_weight", "depthwise_conv2d_backward",
                           "ffn_backward", "mrffi_backward", "pack_conv2d_weight", "quantize_conv2d_weight",
                           "conv_norm", "conv_norm_backward", "ffn_norm", "ffn_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<kernel<false>>());
}

}  // namespace mobilemamba::vmap
