// Argument checks and results; see common.h.
#include "ops/common.h"

#include <ATen/ops/empty.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace mobilemamba {

DType kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      TORCH_CHECK(false, "mobilemamba: no kernel for element type ", type);
  }
}

at::Tensor channels_contiguous(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.movedim(1, -1).contiguous().movedim(-1, 1);
}

Image image_of(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(2), x.stride(3)};
}

at::Tensor empty_image(const at::Tensor& x) {
  return at::empty_symint(x.sym_sizes(), x.options(), at::MemoryFormat::ChannelsLast);
}

at::Tensor empty_parameter(const at::Tensor& x) {
  return at::empty_symint(x.sym_sizes(), x.options());
}

void check_sizes(const char* op, const char* name, c10::SymIntArrayRef shape) {
  int64_t elements = 1;
  for (const c10::SymInt& size : shape) {
    const int64_t known = std::max<int64_t>(size.maybe_as_int().value_or(1), 1);
    TORCH_CHECK(known <= largest_size && elements <= largest_elements / known, op, ": ", name, " has shape ", shape,
                ", expected sizes of at most 2^32 and at most 2^56 elements, where an empty dimension counts as 1");
    elements *= known;
  }
}

void check_kernel_size(const char* op, const char* name, int64_t kernel_size) {
  TORCH_CHECK(kernel_size >= 1 && kernel_size <= largest_kernel_size && kernel_size % 2 == 1, op, ": ", name, " is ",
              kernel_size, ", expected an odd number from 1 to ", largest_kernel_size);
}

void check_stride(const char* op, const char* name, int64_t stride) {
  TORCH_CHECK(stride >= 1 && stride <= largest_stride, op, ": ", name, " is ", stride,
              ", expected at least 1 and at most ", largest_stride);
}

Checks::Checks(const char* op, const char* main_name, const at::Tensor& main)
    : op_(op), main_name_(main_name), main_(main) {
  const at::ScalarType type = main.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op, ": ",
              main_name, " is ", type, ", expected Float, Double, Half or BFloat16");
}

void Checks::dimensions(const char* name, const at::Tensor& tensor, int64_t expected, const char* layout) const {
  TORCH_CHECK(tensor.dim() == expected, op_, ": ", name, " has shape ", tensor.sym_sizes(), ", expected ", expected,
              " dimensions ", layout);
  check_sizes(op_, name, tensor.sym_sizes());
}

void Checks::shape(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected, const char* layout) const {
  dimensions(name, tensor, static_cast<int64_t>(expected.size()), layout);
  for (size_t i = 0; i < expected.size(); ++i)
    TORCH_SYM_CHECK(tensor.sym_size(i).sym_eq(expected[i]), op_, ": ", name, " has shape ", tensor.sym_sizes(),
                    ", expected ", expected, " = ", layout);
}

void Checks::at_least_one(const char* what, const c10::SymInt& size, const char* name, const at::Tensor& tensor) const {
  TORCH_SYM_CHECK(size.sym_ge(1), op_, ": ", name, " has shape ", tensor.sym_sizes(), ", expected ", what,
                  " of at least 1");
}

void Checks::device(const char* name, const at::Tensor& tensor) const {
  TORCH_CHECK(tensor.device() == main_.device(), op_, ": ", name, " is on ", tensor.device(), ", expected ",
              main_.device(), " like ", main_name_);
}

void Checks::like_main(const char* name, const at::Tensor& tensor) const {
  device(name, tensor);
  TORCH_CHECK(tensor.scalar_type() == main_.scalar_type(), op_, ": ", name, " is ", tensor.scalar_type(), ", expected ",
              main_.scalar_type(), " like ", main_name_);
}

void Checks::like_main(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected,
                       const char* layout) const {
  shape(name, tensor, expected, layout);
  like_main(name, tensor);
}

void Checks::quantized(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected) const {
  shape(name, tensor, expected, "as quantized: (ceil(out / 32), ceil(in * kernel_size^2 / 4) + 3, 32, 4)");
  device(name, tensor);
  TORCH_CHECK(main_.is_cpu() || main_.is_meta(), op_, ": ", name, " is quantized, which is for the CPU; ", main_name_,
              " is on ", main_.device());
  TORCH_CHECK(main_.scalar_type() != at::kDouble, op_, ": ", name, " is quantized; ", main_name_,
              " is Double, expected Float, Half or BFloat16");
}

void Checks::parameter(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef expected,
                       const char* layout) const {
  shape(name, tensor, expected, layout);
  device(name, tensor);
  const at::ScalarType type = main_.scalar_type(), accumulate = accumulate_type(type);
  TORCH_CHECK(tensor.scalar_type() == type || tensor.scalar_type() == accumulate, op_, ": ", name, " is ",
              tensor.scalar_type(), ", expected ", type, " like ", main_name_, type == accumulate ? "" : ", or Float");
}

void Checks::kernel(const char* name, const at::Tensor& tensor, const c10::SymInt& out, int64_t planes,
                    const char* layout) const {
  dimensions(name, tensor, 4, layout);
  const c10::SymInt k = tensor.sym_size(3);
  parameter(name, tensor, {out, planes, k, k}, layout);
  TORCH_SYM_CHECK((k % 2).sym_eq(1), op_, ": ", name, " has shape ", tensor.sym_sizes(),
                  ", expected an odd kernel size k");
  TORCH_CHECK(k.maybe_as_int().value_or(1) <= largest_kernel_size, op_, ": ", name, " has shape ", tensor.sym_sizes(),
              ", expected a kernel size k of at most ", largest_kernel_size);
}

}  // namespace mobilemamba
