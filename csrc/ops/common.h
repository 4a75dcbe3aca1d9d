// What the host side of every operator shares: argument checks, results, and torch's types in the kernels' terms.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <tuple>

#include "kernels/common.h"
#include "kernels/image.h"

namespace mobilemamba {

/// The type in which sums over elements of `type` are accumulated.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

DType kernel_dtype(at::ScalarType type);

/// `x` (batch, channels, ...) with contiguous channels; copied only where they are not.
at::Tensor channels_contiguous(const at::Tensor& x);

/// The kernels' view of an image (batch, channels, height, width) with contiguous channels.
Image image_of(const at::Tensor& x);

/// Uninitialised, with the size, dtype and device of `x`: channels-last for images, contiguous for parameters.
at::Tensor empty_image(const at::Tensor& x);
at::Tensor empty_parameter(const at::Tensor& x);

/// The same gradients, filled with zeros: those of an operator on an empty batch.
template <typename... Tensors>
std::tuple<Tensors...> zeroed(const std::tuple<Tensors...>& gradients) {
  std::apply([](const auto&... gradient) { (gradient.zero_(), ...); }, gradients);
  return gradients;
}

constexpr const char* image_layout = "(batch, channels, height, width)";

/// Checks the arguments of one operator. A failed check names the argument, what came and what was expected.
/// The checks read symbolic sizes, so the Meta backend makes them too.
class Checks {
 public:
  /// `main` is the argument that the others must match in device and dtype.
  Checks(const char* op, const char* main_name, const at::Tensor& main);

  /// `layout` names the dimensions, such as "(batch, channels, length)".
  void dimensions(const char* name, const at::Tensor& tensor, int64_t expected, const char* layout) const;
  void shape(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const;
  void at_least_one(const char* what, const c10::SymInt& size, const char* name, const at::Tensor& tensor) const;

  /// The device and dtype of the main argument; with `expected` also this shape.
  void like_main(const char* name, const at::Tensor& tensor) const;
  void like_main(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const;
  /// The shape `expected`, the device of the main argument, and its dtype or, beside 16 bits, float32.
  void parameter(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const;
  /// The parameter (out, planes, k, k) with an odd k.
  void kernel(const char* name, const at::Tensor& tensor, const c10::SymInt& out, int64_t planes,
              const char* layout) const;

 private:
  void device(const char* name, const at::Tensor& tensor) const;

  const char *op_, *main_name_;
  at::Tensor main_;
};

}  // namespace mobilemamba
