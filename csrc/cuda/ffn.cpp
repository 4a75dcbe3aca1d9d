// The feed-forward layer on CUDA. Its matrix products are torch's.
#include "ops/ffn.h"

#include "cuda/run.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

at::Tensor forward(const FfnArguments& arguments) {
  const DeviceOf device(arguments.input);
  return arguments.with(ffn_with_torch);
}

FfnGradients backward(const at::Tensor& grad_output, const FfnArguments& arguments) {
  const DeviceOf device(arguments.input);
  return ffn_backward_composed(grad_output, arguments);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("ffn", kernel_of<ffn, forward>);
  m.impl("ffn_backward", kernel_of<ffn_backward, backward>);
}

}  // namespace mobilemamba::cuda
