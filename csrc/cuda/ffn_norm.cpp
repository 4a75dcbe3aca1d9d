// The feed-forward layer in training on CUDA: torch's operators, which call cuDNN.
#include "ops/ffn_norm.h"

#include "cuda/run.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba::cuda {
namespace {

FfnNormResult ffn_norm_cuda(const FfnNormArguments& a) {
  const DeviceOf device(a.input);
  return ffn_norm_composed(a);
}

FfnNormGradients ffn_norm_backward_cuda(const at::Tensor& grad_output, const at::Tensor& input,
                                        at::TensorList parameters, at::TensorList saved, double expand_eps,
                                        double project_eps) {
  const DeviceOf device(input);
  return ffn_norm_backward_composed(grad_output, ffn_norm_arguments(input, parameters, expand_eps, project_eps),
                                    FfnNormSaved(saved));
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("ffn_norm", kernel_of<ffn_norm, ffn_norm_cuda>);
  m.impl("ffn_norm_backward", ffn_norm_backward_cuda);
}

}  // namespace mobilemamba::cuda
