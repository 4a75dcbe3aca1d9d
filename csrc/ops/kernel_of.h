// Makes a kernel from a function that takes the operator's arguments as a struct. So an operator's long signature is
// written only in mobilemamba.h and in operators.cpp.
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

/// A kernel for the operator with the public function `op`. It calls `function` with a struct that has the operator's
/// arguments as members, in their order. A backward operator passes its gradient before the struct.
template <auto op, auto function>
inline constexpr auto kernel_of = &detail::KernelOf<function, decltype(op)>::call;

}  // namespace mobilemamba
