// The bidirectional scan on the CPU.
#include "ops/bidirectional_scan.h"

#include <torch/library.h>

#include "cpu/run.h"

namespace mobilemamba::cpu {
namespace {

at::Tensor forward(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log, const at::Tensor& B,
                   const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  const ScanArguments arguments{u, delta, A_log, B, C, D, dt_weight, dt_bias};
  arguments.check();
  const ScanInputs inputs(arguments);
  at::Tensor y = scan_output(u);
  run(kernels().scan_forward, inputs.forward(y));
  return y;
}

ScanGradients backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log,
                       const at::Tensor& B, const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight,
                       const at::Tensor& dt_bias) {
  const ScanArguments arguments{u, delta, A_log, B, C, D, dt_weight, dt_bias};
  arguments.check_backward(grad_y);
  ScanBackwardInputs inputs(grad_y, arguments);
  run(kernels().scan_backward, inputs.backward());
  return inputs.gradients(arguments);
}

}  // namespace

TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("bidirectional_scan", forward);
  m.impl("bidirectional_scan_backward", backward);
}

}  // namespace mobilemamba::cpu
