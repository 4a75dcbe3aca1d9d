// The pointwise convolution on the CPU.
#include "ops/pointwise_conv2d.h"

#include <torch/library.h>

#include "cpu/run.h"

namespace mobilemamba::cpu {
namespace {

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& residual, std::string_view activation) {
  const PointwiseArguments arguments{input, weight, bias, residual, activation};
  if (input.scalar_type() == at::kDouble) return arguments.with_matmul();
  return arguments.with([](const PointwiseForward& p) {
    run(p.dtype == DType::bfloat16 ? kernels().pointwise_bfloat16 : kernels().pointwise, p);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("pointwise_conv2d", forward);
}

}  // namespace mobilemamba::cpu
