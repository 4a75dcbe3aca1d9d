// Shared by the host side of every operator: argument checks, results, and torch's types as the kernels name them.
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

/// Bounds of sizes, far beyond any memory. With them no sum or product that is computed from sizes overflows an
/// int64_t: of a few sizes of one tensor, or of the square of a kernel size and a number of channels.
constexpr int64_t largest_size = int64_t{1} << 32, largest_elements = int64_t{1} << 56;
constexpr int64_t largest_kernel_size = (1 << 15) - 1, largest_stride = (int64_t{1} << 31) - 1;

/// Checks the sizes `shape` of the argument `name` of the operator `op`. Symbolic sizes are checked with their values.
void check_sizes(const char* op, const char* name, c10::SymIntArrayRef shape);
void check_kernel_size(const char* op, const char* name, int64_t kernel_size);
void check_stride(const char* op, const char* name, int64_t stride);

/// ceil_div for sizes that may be symbolic.
inline c10::SymInt ceil_div(const c10::SymInt& a, int64_t b) {
  return (a + (b - 1)) / b;
}

/// `x` (batch, channels, ...) with contiguous channels; copied only where they are not.
at::Tensor channels_contiguous(const at::Tensor& x);

/// The kernels' view of an image (batch, channels, height, width) with contiguous channels.
Image image_of(const at::Tensor& x);

/// Uninitialised, with the size, dtype and device of `x`: channels-last for images, contiguous for parameters.
at::Tensor empty_image(const at::Tensor& x);
at::Tensor empty_parameter(const at::Tensor& x);

/// Fills the gradients with zeros, which is right for an empty batch.
template <typename... Tensors>
std::tuple<Tensors...> zeroed(const std::tuple<Tensors...>& gradients) {
  std::apply([](const auto&... gradient) { (gradient.zero_(), ...); }, gradients);
  return gradients;
}

constexpr const char* image_layout = "(batch, channels, height, width)";

/// Checks the arguments of one operator. The error of a failed check names the argument, its value and the expected
/// one. Sizes may be symbolic, so the Meta backend makes the same checks.
class Checks {
 public:
  /// The other arguments must match the device and dtype of `main`.
  Checks(const char* op, const char* main_name, const at::Tensor& main);

  /// The number of dimensions, and sizes within the bounds. `layout` names the dimensions, such as
  /// "(batch, channels, length)".
  void dimensions(const char* name, const at::Tensor& tensor, int64_t expected, const char* layout) const;
  void shape(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const;
  void at_least_one(const char* what, const c10::SymInt& size, const char* name, const at::Tensor& tensor) const;

  /// The device and dtype of the main argument, and the shape `expected` if given.
  void like_main(const char* name, const at::Tensor& tensor) const;
  void like_main(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const;
  /// A quantized weight of the shape `expected`, in int8, beside a main argument on the CPU that is not float64.
  void quantized(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected) const;
  /// The shape `expected`, the device of the main argument, and its dtype; beside a 16-bit dtype also float32.
  void parameter(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const;
  /// A parameter (out, planes, k, k) with an odd k.
  void kernel(const char* name, const at::Tensor& tensor, const c10::SymInt& out, int64_t planes,
              const char* layout) const;

 private:
  void device(const char* name, const at::Tensor& tensor) const;

  const char *op_, *main_name_;
  at::Tensor main_;
};

}  // namespace mobilemamba
