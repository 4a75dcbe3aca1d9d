// The Haar convolution on the CPU.
#include "ops/haar_conv2d.h"

#include "cpu/backends.h"
#include "cpu/run.h"
#include "registration.h"

namespace mobilemamba::cpu {
constinit const HaarBackend haar = {
    .forward = [](const HaarForward& p) { run(kernels().haar_forward, p); },
    .backward_weight_slabs = [](const HaarSizes& p) { return backward_weight_slabs(p.batch, p.channels); },
    .backward_weight = [](const HaarBackwardWeight& p) { run(kernels().haar_backward_weight, p); },
};

namespace {

at::Tensor haar_conv2d_cpu(const at::Tensor& input, const at::Tensor& weight) {
  return haar.haar_conv2d(input, weight);
}

at::Tensor haar_conv2d_backward_weight_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                           int64_t kernel_size) {
  return haar.haar_conv2d_backward_weight(grad_output, input, kernel_size);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("haar_conv2d", haar_conv2d_cpu);
  m.impl("haar_conv2d_backward_weight", haar_conv2d_backward_weight_cpu);
}

}  // namespace mobilemamba::cpu
