// The Haar convolution on CUDA.
#include "ops/haar_conv2d.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
constinit const HaarBackend haar = {
    .forward =
        [](const HaarForward& p) { check_launch(haar_forward(p, shared_limit(), c10::cuda::getCurrentCUDAStream())); },
    .backward_weight_slabs = [](const HaarSizes& p) { return haar_backward_weight_slabs(p, shared_limit()); },
    .backward_weight =
        [](const HaarBackwardWeight& p) {
          check_launch(haar_backward_weight(p, shared_limit(), c10::cuda::getCurrentCUDAStream()));
        },
};

namespace {

at::Tensor haar_conv2d_cuda(const at::Tensor& input, const at::Tensor& weight) {
  const DeviceOf device(input);
  return haar.haar_conv2d(input, weight);
}

at::Tensor haar_conv2d_backward_weight_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                            int64_t kernel_size) {
  const DeviceOf device(input);
  return haar.haar_conv2d_backward_weight(grad_output, input, kernel_size);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("haar_conv2d", haar_conv2d_cuda);
  m.impl("haar_conv2d_backward_weight", haar_conv2d_backward_weight_cuda);
}

}  // namespace mobilemamba::cuda
