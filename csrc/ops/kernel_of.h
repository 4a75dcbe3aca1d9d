// Kernels from functions that take an operator's arguments as a struct, so that its long signature stands only in
// mobilemamba.h and where the operator is called.
#pragma once

#include <ATen/core/Tensor.h>

#include <utility>

namespace mobilemamba {
namespace detail {

template <auto function, typename Operator>
struct KernelOf;

template <typename Result, typename Arguments, Result (*function)(const Arguments&), typename... Args>
struct KernelOf<function, Result (*)(Args...)> {
  static Result call(Args... args) { return function(Arguments{args...}); }
};

template <typename Result, typename Arguments, Result (*function)(const at::Tensor&, const Arguments&),
          typename... Args>
struct KernelOf<function, Result (*)(const at::Tensor&, Args...)> {
  static Result call(const at::Tensor& grad, Args... args) { return function(grad, Arguments{args...}); }
};

}  // namespace detail

/// A kernel of the operator `op` (its public function): calls `function` with a struct of the operator's arguments in
/// their order. A backward operator's gradient comes before the struct.
template <auto op, auto function>
inline constexpr auto kernel_of = &detail::KernelOf<function, decltype(op)>::call;

}  // namespace mobilemamba
