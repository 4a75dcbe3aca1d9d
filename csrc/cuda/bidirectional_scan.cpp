// The bidirectional scan on CUDA.
#include "ops/bidirectional_scan.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/run.h"
#include "ops/kernel_of.h"
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

at::Tensor bidirectional_scan_cuda(const ScanArguments& a) {
  const DeviceOf device(a.u);
  return scan.bidirectional_scan(a);
}

ScanGradients bidirectional_scan_backward_cuda(const at::Tensor& grad_y, const ScanArguments& a) {
  const DeviceOf device(a.u);
  return scan.bidirectional_scan_backward(grad_y, a);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("bidirectional_scan", kernel_of<bidirectional_scan, bidirectional_scan_cuda>);
  m.impl("bidirectional_scan_backward", kernel_of<bidirectional_scan_backward, bidirectional_scan_backward_cuda>);
}

}  // namespace mobilemamba::cuda
