// The depthwise convolution on CUDA.
#include "ops/depthwise_conv2d.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
constinit const DepthwiseBackend depthwise = {
    .forward =
        [](const DepthwiseForward& p) {
          check_launch(depthwise_forward(p, shared_limit(), c10::cuda::getCurrentCUDAStream()));
        },
    .backward_input =
        [](const DepthwiseBackwardInput& p) {
          check_launch(depthwise_backward_input(p, c10::cuda::getCurrentCUDAStream()));
        },
    .backward_weight_slabs = [](const DepthwiseSizes& p) { return depthwise_backward_weight_slabs(p, shared_limit()); },
    .backward_weight =
        [](const DepthwiseBackwardWeight& p) {
          check_launch(depthwise_backward_weight(p, shared_limit(), c10::cuda::getCurrentCUDAStream()));
        },
};

namespace {

at::Tensor depthwise_conv2d_cuda(const at::Tensor& input, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                                 int64_t stride, std::string_view activation) {
  const DeviceOf device(input);
  return depthwise.depthwise_conv2d({input, weight, bias, stride, activation}, residual);
}

DepthwiseGradients depthwise_conv2d_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                                  const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                                  int64_t stride, std::string_view activation) {
  const DeviceOf device(input);
  return depthwise.depthwise_conv2d_backward(grad_output, {input, weight, bias, stride, activation});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("depthwise_conv2d", depthwise_conv2d_cuda);
  m.impl("depthwise_conv2d_backward", depthwise_conv2d_backward_cuda);
}

}  // namespace mobilemamba::cuda
