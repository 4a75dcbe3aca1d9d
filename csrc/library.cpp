// Every operator of the library: one schema each.
#include <torch/library.h>

TORCH_LIBRARY(mobilemamba, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "bidirectional_scan(Tensor u, Tensor delta, Tensor A_log, Tensor B, Tensor C, Tensor D, Tensor dt_weight, "
      "Tensor dt_bias) -> Tensor",
      tags);
  m.def(
      "bidirectional_scan_backward(Tensor grad_y, Tensor u, Tensor delta, Tensor A_log, Tensor B, Tensor C, Tensor D, "
      "Tensor dt_weight, Tensor dt_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def("haar_conv2d(Tensor input, Tensor weight) -> Tensor", tags);
  m.def("haar_conv2d_backward_weight(Tensor grad_output, Tensor input, int kernel_size) -> Tensor", tags);
  m.def(
      "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias=None, Tensor? residual=None, int stride=1, "
      "str activation=\"none\") -> Tensor",
      tags);
  m.def(
      "depthwise_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, int stride, "
      "str activation) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      tags);
  m.def(
      "packed_conv2d(Tensor input, Tensor weight, Tensor bias, Tensor? residual=None, int kernel_size=1, "
      "int stride=1, str activation=\"none\") -> Tensor",
      tags);
  m.def("pack_conv2d_weight(Tensor weight) -> Tensor", tags);
  // the instruction set that the CPU kernels were chosen for: generic, avx2 or avx512
  m.def("cpu_kernels() -> str");
}
