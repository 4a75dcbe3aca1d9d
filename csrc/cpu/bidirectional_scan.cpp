// The bidirectional scan on the CPU.
#include "ops/bidirectional_scan.h"

#include "cpu/backends.h"
#include "cpu/run.h"
#include "ops/kernel_of.h"
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

at::Tensor bidirectional_scan_cpu(const ScanArguments& a) {
  return scan.bidirectional_scan(a);
}

ScanGradients bidirectional_scan_backward_cpu(const at::Tensor& grad_y, const ScanArguments& a) {
  return scan.bidirectional_scan_backward(grad_y, a);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("bidirectional_scan", kernel_of<bidirectional_scan, bidirectional_scan_cpu>);
  m.impl("bidirectional_scan_backward", kernel_of<bidirectional_scan_backward, bidirectional_scan_backward_cpu>);
}

}  // namespace mobilemamba::cpu
