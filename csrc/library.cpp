// The schema of every operator.
#include <ATen/core/dispatch/Dispatcher.h>

#include "build.h"
#include "registration.h"

namespace mobilemamba {

bool first_copy() {
  static const bool first = [] {
    const auto other = c10::Dispatcher::singleton().findSchema({"mobilemamba::version", ""});
    if (!other) return true;
    const std::string loaded = other->typed<std::string()>().call();
    if (loaded != build::version)
      TORCH_WARN("libmobilemamba ", build::version, " does not register its operators: those of mobilemamba ", loaded,
                 " are in this process already, and all calls go to them; load one version only");
    return false;
  }();
  return first;
}

MOBILEMAMBA_LIBRARY(m) {
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
      "conv_norm(Tensor input, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor? residual=None, "
      "int stride=1, str activation=\"none\", float eps=1e-5) -> (Tensor output, Tensor mean, Tensor var, "
      "Tensor convolved)",
      tags);
  m.def(
      "conv_norm_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor norm_weight, Tensor norm_bias, "
      "Tensor convolved, Tensor mean, Tensor var, int stride, str activation, float eps, bool input_gradient) -> "
      "(Tensor grad_input, Tensor grad_weight, Tensor grad_norm_weight, Tensor grad_norm_bias)",
      tags);
  m.def(
      "ffn_norm(Tensor input, Tensor expand_weight, Tensor expand_norm_weight, Tensor expand_norm_bias, "
      "Tensor project_weight, Tensor project_norm_weight, Tensor project_norm_bias, float expand_eps=1e-5, "
      "float project_eps=1e-5) -> (Tensor output, Tensor expand_mean, Tensor expand_var, Tensor project_mean, "
      "Tensor project_var, Tensor expanded, Tensor projected)",
      tags);
  m.def(
      "ffn_norm_backward(Tensor grad_output, Tensor input, Tensor[] parameters, Tensor[] saved, float expand_eps, "
      "float project_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "packed_conv2d(Tensor input, Tensor weight, Tensor bias, Tensor? residual=None, int kernel_size=1, "
      "int stride=1, str activation=\"none\") -> Tensor",
      tags);
  m.def("pack_conv2d_weight(Tensor weight) -> Tensor", tags);
  m.def("quantize_conv2d_weight(Tensor weight, float scale, int zero_point) -> Tensor", tags);
  m.def(
      "ffn(Tensor input, Tensor? residual, Tensor expand_weight, Tensor expand_bias, Tensor project_weight, "
      "Tensor project_bias) -> Tensor",
      tags);
  m.def(
      "ffn_backward(Tensor grad_output, Tensor input, Tensor expand_weight, Tensor expand_bias, "
      "Tensor project_weight, Tensor project_bias) -> (Tensor grad_input, Tensor grad_expand_weight, "
      "Tensor grad_expand_bias, Tensor grad_project_weight, Tensor grad_project_bias)",
      tags);
  // the weights are in the order of mrffi_weights (ops/mrffi.cpp)
  m.def("mrffi(Tensor input, Tensor? residual, Tensor[] weights, float eps=1e-5) -> Tensor", tags);
  m.def(
      "mrffi_backward(Tensor grad_output, Tensor input, Tensor[] weights, float eps) -> (Tensor grad_input, "
      "Tensor[] grad_weights)",
      tags);
  m.def("patch_embedding(Tensor input, Tensor[] weights, Tensor[] biases, int[] strides) -> Tensor", tags);
  m.def(
      "patch_merging(Tensor input, Tensor expand_weight, Tensor expand_bias, Tensor depthwise_weight, "
      "Tensor depthwise_bias, Tensor squeeze_weight, Tensor squeeze_bias, Tensor excite_weight, Tensor excite_bias, "
      "Tensor project_weight, Tensor project_bias) -> Tensor",
      tags);
  // the weights are in the order of the layers (ops/backbone.cpp)
  m.def(
      "backbone(Tensor input, Tensor[] weights, int[] strides, int[] depths, Tensor? head_weight=None, Tensor? "
      "head_bias=None, float eps=1e-5) -> Tensor[]",
      tags);
  m.def("version() -> str");
  m.def("build_facts() -> Dict(str, str)");
  m.def("cpu_kernels() -> str");
}

}  // namespace mobilemamba
