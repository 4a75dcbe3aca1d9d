// The convolution on a packed weight on the CPU.
#include "ops/packed_conv2d.h"

#include "cpu/backends.h"
#include "cpu/run.h"
#include "registration.h"

namespace mobilemamba::cpu {

const Kernel<PackedConvForward>& packed_conv_kernel(DType type) {
  return type == DType::bfloat16 ? kernels().packed_conv_bfloat16 : kernels().packed_conv;
}

void run_packed_conv(const PackedConvForward& p) {
  run(packed_conv_kernel(p.dtype), p);
}

namespace {

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& residual, int64_t kernel_size, int64_t stride,
                   std::string_view activation) {
  const PackedConvArguments arguments{input, weight, bias, residual, kernel_size, stride, activation};
  if (input.scalar_type() == at::kDouble) return arguments.with_torch();
  return arguments.with(run_packed_conv);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("packed_conv2d", forward);
}

}  // namespace mobilemamba::cpu
