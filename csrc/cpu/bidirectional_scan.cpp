// The bidirectional scan on the CPU.
#include "ops/bidirectional_scan.h"

#include "cpu/backends.h"
#include "cpu/run.h"
#include "registration.h"

namespace mobilemamba::cpu {
constinit const ScanBackend scan = {
    .forward_scratch_bytes = [](const ScanForward&) -> size_t { return 0; },
    .forward = [](const ScanForward& p) { run(kernels().scan_forward, p); },
    .divide_backward =
        [](ScanBackward& p) {
          p.group_channels = scan_group_channels;
          p.segments = scan_segments;
        },
    .backward_scratch_bytes = [](const ScanBackward&) -> size_t { return 0; },
    .backward = [](const ScanBackward& p) { run(kernels().scan_backward, p); },
};

namespace {

at::Tensor forward(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log, const at::Tensor& B,
                   const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  return scan.bidirectional_scan({u, delta, A_log, B, C, D, dt_weight, dt_bias});
}

ScanGradients backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log,
                       const at::Tensor& B, const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight,
                       const at::Tensor& dt_bias) {
  return scan.bidirectional_scan_backward(grad_y, {u, delta, A_log, B, C, D, dt_weight, dt_bias});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("bidirectional_scan", forward);
  m.impl("bidirectional_scan_backward", backward);
}

}  // namespace mobilemamba::cpu
