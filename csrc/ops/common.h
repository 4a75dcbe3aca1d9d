// What the host side of every operator shares: argument checks, and torch's types in the kernels' terms.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include "kernels/common.h"
#include "kernels/image.h"

namespace mobilemamba {

/// The type that sums over elements of this type are kept in.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

DType kernel_dtype(at::ScalarType type);

/// A tensor (batch, channels, ...) whose channels are contiguous: the same one where it is so already.
at::Tensor channels_contiguous(const at::Tensor& x);

/// The kernels' view of a (batch, channels, height, width) tensor with contiguous channels.
Image image_of(const at::Tensor& x);

/// Checks for one operator. Each failure names the argument, what came and what was expected.
/// They read symbolic sizes, so the Meta backend makes them as well.
class Checks {
 public:
  Checks(const char* op, const char* main_name, const at::Tensor& main);
  /// `layout` names the dimensions, such as "(batch, channels, length)".
  void dimensions(const char* name, const at::Tensor& tensor, int64_t expected, const char* layout) const;
  void shape(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const;
  void at_least_one(const char* what, const c10::SymInt& size, const char* name, const at::Tensor& tensor) const;
  /// Device and dtype of the main argument.
  void like_main(const char* name, const at::Tensor& tensor) const;
  /// The same, or float32 beside a 16-bit main argument.
  void parameter(const char* name, const at::Tensor& tensor) const;

 private:
  void device(const char* name, const at::Tensor& tensor) const;

  const char *op_, *main_name_;
  const at::Tensor& main_;
};

}  // namespace mobilemamba
