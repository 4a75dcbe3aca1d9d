// The Haar convolution on the CPU.
#include "ops/haar_conv2d.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/run.h"
#include "ops/common.h"

namespace mobilemamba::cpu {
namespace {

at::Tensor forward(const at::Tensor& input, const at::Tensor& weight) {
  check_haar_conv2d(input, weight);
  const at::Tensor image = haar_image(input), packed = haar_packed_weight(weight, input.scalar_type());
  at::Tensor output = haar_output(input);
  run(kernels().haar_forward, haar_forward_params(image, packed, output));
  return output;
}

at::Tensor backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size) {
  check_haar_conv2d_backward_weight(grad_output, input, kernel_size);
  const at::Tensor grad_image = haar_image(grad_output), image = haar_image(input);
  at::Tensor packed = at::empty({4, kernel_size, kernel_size, input.size(1)},
                                input.options().dtype(accumulate_type(input.scalar_type())));
  run(kernels().haar_backward_weight, haar_backward_weight_params(grad_image, image, packed));
  at::Tensor grad_weight = haar_grad_weight(input, kernel_size);
  grad_weight.view({input.size(1), 4, kernel_size, kernel_size}).copy_(packed.permute({3, 0, 1, 2}));
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(mobilemamba, CPU, m) {
  m.impl("haar_conv2d", forward);
  m.impl("haar_conv2d_backward_weight", backward_weight);
}

}  // namespace mobilemamba::cpu
