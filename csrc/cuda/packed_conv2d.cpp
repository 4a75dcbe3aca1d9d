// The convolution with a packed weight on CUDA, and matrix products. Those in 16 bits have a kernel for tensor cores,
// the others are torch's.
#include "ops/packed_conv2d.h"

#include "cuda/backends.h"
#include "cuda/kernels.h"
#include "cuda/run.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

void run_packed_conv(const PackedConvForward& p) {
  check_launch(packed_conv(p, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor packed_conv2d_cuda(const PackedConvArguments& a) {
  const DeviceOf device(a.input);
  return has_tensor_cores(a.input) ? a.with(run_packed_conv) : a.with_torch();
}

}  // namespace

bool has_tensor_cores(const at::Tensor& input) {
  const at::ScalarType type = input.scalar_type();
  return (type == at::kHalf || type == at::kBFloat16) && compute_capability().major >= 8;
}

void product(const Product& p, at::Tensor output) {
  if (p.weight.dim() == 4 && has_tensor_cores(p.input)) return product_with_kernel(p, output, run_packed_conv);
  product_with_torch(p, output);
}

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("packed_conv2d", kernel_of<packed_conv2d, packed_conv2d_cuda>);
}

}  // namespace mobilemamba::cuda
