// The convolution with a packed weight on CUDA, by torch. Models on CUDA keep their weights unpacked.
#include "ops/packed_conv2d.h"

#include "cuda/run.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

at::Tensor packed_conv2d_cuda(const PackedConvArguments& a) {
  const DeviceOf device(a.input);
  return a.with_torch();
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("packed_conv2d", kernel_of<packed_conv2d, packed_conv2d_cuda>);
}

}  // namespace mobilemamba::cuda
