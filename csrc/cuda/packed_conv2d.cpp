// The convolution with a packed weight on CUDA, by torch. Models on CUDA keep their weights unpacked.
#include "ops/packed_conv2d.h"

#include "cuda/run.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& residual, int64_t kernel_size, int64_t stride,
                   std::string_view activation) {
  const DeviceOf device(input);
  return PackedConvArguments{input, weight, bias, residual, kernel_size, stride, activation}.with_torch();
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("packed_conv2d", forward);
}

}  // namespace mobilemamba::cuda
