// The MRFFI block on CUDA.
#include "ops/mrffi.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/launch_rows.h"
#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

/// Runs a kernel where its launch exists.
template <typename P>
bool run_if_exists(const P& p, RowTileLaunch (*launch_of)(const P&, size_t, bool),
                   cudaError_t (*kernel)(const P&, const RowTileLaunch&, cudaStream_t)) {
  const Form form = chosen_form();
  if (compute_capability().major < 8 || form == Form::products) return false;
  const RowTileLaunch launch = launch_of(p, shared_limit(), form == Form::kernel);
  if (launch.exists()) check_launch(kernel(p, launch, c10::cuda::getCurrentCUDAStream()));
  return launch.exists();
}

MrffiBackend backend() {
  return {
      .scan = scan,
      .haar = haar,
      .depthwise = depthwise,
      .gate = [](const GateForward& p) { check_launch(gate_forward(p, c10::cuda::getCurrentCUDAStream())); },
      .conv_product = [](const ConvProduct& p) { return run_if_exists(p, conv_product_launch, conv_product); },
      .gate_product = [](const GateProduct& p) { return run_if_exists(p, gate_product_launch, gate_product); },
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
