// The depthwise convolution on the CPU.
#include "ops/depthwise_conv2d.h"

#include "cpu/backends.h"
#include "cpu/run.h"
#include "registration.h"

namespace mobilemamba::cpu {
constinit const DepthwiseBackend depthwise = {
    .forward = [](const DepthwiseForward& p) { run(kernels().depthwise_forward, p); },
    .backward_input = [](const DepthwiseBackwardInput& p) { run(kernels().depthwise_backward_input, p); },
    .backward_weight_slabs = [](const DepthwiseSizes& p) { return backward_weight_slabs(p.batch, p.channels); },
    .backward_weight = [](const DepthwiseBackwardWeight& p) { run(kernels().depthwise_backward_weight, p); },
};

namespace {

at::Tensor depthwise_conv2d_cpu(const at::Tensor& input, const at::Tensor& weight,
                                const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                                int64_t stride, std::string_view activation) {
  return depthwise.depthwise_conv2d({input, weight, bias, stride, activation}, residual);
}

DepthwiseGradients depthwise_conv2d_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                                                 const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                                 int64_t stride, std::string_view activation) {
  return depthwise.depthwise_conv2d_backward(grad_output, {input, weight, bias, stride, activation});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("depthwise_conv2d", depthwise_conv2d_cpu);
  m.impl("depthwise_conv2d_backward", depthwise_conv2d_backward_cpu);
}

}  // namespace mobilemamba::cpu
