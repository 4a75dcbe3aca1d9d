// The MRFFI block on CUDA.
#include "ops/mrffi.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

MrffiBackend backend() {
  return {
      .scan = scan,
      .haar = haar,
      .depthwise = depthwise,
      .gate = [](const GateForward& p) { check_launch(gate_forward(p, c10::cuda::getCurrentCUDAStream())); },
      .product = product,
      .in_parts = [](int64_t batch, int64_t, c10::function_ref<void(int64_t, int64_t)> run) { run(0, batch); },
  };
}

at::Tensor mrffi_cuda(const at::Tensor& input, const std::optional<at::Tensor>& residual, at::TensorList weights,
                      double eps) {
  const DeviceOf device(input);
  const MrffiArguments arguments{input, MrffiWeights(weights), eps};
  arguments.check(residual);
  return backend().mrffi(arguments, residual);
}

MrffiGradients mrffi_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input, at::TensorList weights,
                                   double eps) {
  const DeviceOf device(input);
  return mrffi_backward_composed(grad_output, {input, MrffiWeights(weights), eps});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("mrffi", mrffi_cuda);
  m.impl("mrffi_backward", mrffi_backward_cuda);
}

}  // namespace mobilemamba::cuda
