// The bidirectional scan on CUDA.
#include "ops/bidirectional_scan.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
constinit const ScanBackend scan = {
    .forward_scratch_bytes = scan_forward_scratch_bytes,
    .forward = [](const ScanForward& p) { check_launch(scan_forward(p, c10::cuda::getCurrentCUDAStream())); },
    .divide_backward = scan_divide_backward,
    .backward_scratch_bytes = scan_backward_scratch_bytes,
    .backward = [](const ScanBackward& p) { check_launch(scan_backward(p, c10::cuda::getCurrentCUDAStream())); },
};

namespace {

at::Tensor forward(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log, const at::Tensor& B,
                   const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  const DeviceOf device(u);
  return scan.bidirectional_scan({u, delta, A_log, B, C, D, dt_weight, dt_bias});
}

ScanGradients backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log,
                       const at::Tensor& B, const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight,
                       const at::Tensor& dt_bias) {
  const DeviceOf device(u);
  return scan.bidirectional_scan_backward(grad_y, {u, delta, A_log, B, C, D, dt_weight, dt_bias});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("bidirectional_scan", forward);
  m.impl("bidirectional_scan_backward", backward);
}

}  // namespace mobilemamba::cuda
