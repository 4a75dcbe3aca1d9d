// The feed-forward layer on CUDA.
#include "ops/ffn.h"

#include "cuda/backends.h"
#include "cuda/run.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

at::Tensor ffn_cuda(const FfnArguments& arguments) {
  const DeviceOf device(arguments.input);
  return arguments.with([](const FfnRows& rows) { return ffn_of_products(rows, product); });
}

FfnGradients ffn_backward_cuda(const at::Tensor& grad_output, const FfnArguments& arguments) {
  const DeviceOf device(arguments.input);
  return ffn_backward_composed(grad_output, arguments);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("ffn", kernel_of<ffn, ffn_cuda>);
  m.impl("ffn_backward", kernel_of<ffn_backward, ffn_backward_cuda>);
}

}  // namespace mobilemamba::cuda
