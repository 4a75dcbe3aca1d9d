// The pointwise convolution on CUDA: a matrix product of torch's. Models keep its weight unpacked there.
#include "ops/pointwise_conv2d.h"

#include <torch/library.h>

#include "cuda/run.h"

namespace mobilemamba::cuda {
namespace {

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& residual, std::string_view activation) {
  const DeviceOf device(input);
  return PointwiseArguments{input, weight, bias, residual, activation}.with_matmul();
}

}  // namespace

TORCH_LIBRARY_IMPL(mobilemamba, CUDA, m) {
  m.impl("pointwise_conv2d", forward);
}

}  // namespace mobilemamba::cuda
