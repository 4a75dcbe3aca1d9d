// The public functions: each calls its operator through torch's dispatcher.
#include <ATen/core/dispatch/Dispatcher.h>

#include "mobilemamba.h"

namespace mobilemamba {
namespace {

/// The operator `name`, which has the signature of its public function. Callers keep it and search only once.
template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

at::Tensor bidirectional_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log,
                              const at::Tensor& B, const at::Tensor& C, const at::Tensor& D,
                              const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  static const auto op = operator_named<decltype(bidirectional_scan)>("mobilemamba::bidirectional_scan");
  return op.call(u, delta, A_log, B, C, D, dt_weight, dt_bias);
}

ScanGradients bidirectional_scan_backward(const at::Tensor& grad_y, const at::Tensor& u, const at::Tensor& delta,
                                          const at::Tensor& A_log, const at::Tensor& B, const at::Tensor& C,
                                          const at::Tensor& D, const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  static const auto op =
      operator_named<decltype(bidirectional_scan_backward)>("mobilemamba::bidirectional_scan_backward");
  return op.call(grad_y, u, delta, A_log, B, C, D, dt_weight, dt_bias);
}

at::Tensor haar_conv2d(const at::Tensor& input, const at::Tensor& weight) {
  static const auto op = operator_named<decltype(haar_conv2d)>("mobilemamba::haar_conv2d");
  return op.call(input, weight);
}

at::Tensor haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input, int64_t kernel_size) {
  static const auto op =
      operator_named<decltype(haar_conv2d_backward_weight)>("mobilemamba::haar_conv2d_backward_weight");
  return op.call(grad_output, input, kernel_size);
}

at::Tensor depthwise_conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual, int64_t stride, std::string_view activation) {
  static const auto op = operator_named<decltype(depthwise_conv2d)>("mobilemamba::depthwise_conv2d");
  return op.call(input, weight, bias, residual, stride, activation);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_conv2d_backward(const at::Tensor& grad_output,
                                                                         const at::Tensor& input,
                                                                         const at::Tensor& weight,
                                                                         const std::optional<at::Tensor>& bias,
                                                                         int64_t stride, std::string_view activation) {
  static const auto op = operator_named<decltype(depthwise_conv2d_backward)>("mobilemamba::depthwise_conv2d_backward");
  return op.call(grad_output, input, weight, bias, stride, activation);
}

ConvNormResult conv_norm(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& norm_weight,
                         const at::Tensor& norm_bias, const std::optional<at::Tensor>& residual, int64_t stride,
                         std::string_view activation, double eps) {
  static const auto op = operator_named<decltype(conv_norm)>("mobilemamba::conv_norm");
  return op.call(input, weight, norm_weight, norm_bias, residual, stride, activation, eps);
}

ConvNormGradients conv_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                     const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                     const at::Tensor& convolved, const at::Tensor& mean, const at::Tensor& var,
                                     int64_t stride, std::string_view activation, double eps, bool input_gradient) {
  static const auto op = operator_named<decltype(conv_norm_backward)>("mobilemamba::conv_norm_backward");
  return op.call(grad_output, input, weight, norm_weight, norm_bias, convolved, mean, var, stride, activation, eps,
                 input_gradient);
}

FfnNormResult ffn_norm(const at::Tensor& input, const at::Tensor& expand_weight, const at::Tensor& expand_norm_weight,
                       const at::Tensor& expand_norm_bias, const at::Tensor& project_weight,
                       const at::Tensor& project_norm_weight, const at::Tensor& project_norm_bias, double expand_eps,
                       double project_eps) {
  static const auto op = operator_named<decltype(ffn_norm)>("mobilemamba::ffn_norm");
  return op.call(input, expand_weight, expand_norm_weight, expand_norm_bias, project_weight, project_norm_weight,
                 project_norm_bias, expand_eps, project_eps);
}

FfnNormGradients ffn_norm_backward(const at::Tensor& grad_output, const at::Tensor& input, at::TensorList parameters,
                                   at::TensorList saved, double expand_eps, double project_eps) {
  static const auto op = operator_named<decltype(ffn_norm_backward)>("mobilemamba::ffn_norm_backward");
  return op.call(grad_output, input, parameters, saved, expand_eps, project_eps);
}

at::Tensor packed_conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                         const std::optional<at::Tensor>& residual, int64_t kernel_size, int64_t stride,
                         std::string_view activation) {
  static const auto op = operator_named<decltype(packed_conv2d)>("mobilemamba::packed_conv2d");
  return op.call(input, weight, bias, residual, kernel_size, stride, activation);
}

at::Tensor ffn(const at::Tensor& input, const std::optional<at::Tensor>& residual, const at::Tensor& expand_weight,
               const at::Tensor& expand_bias, const at::Tensor& project_weight, const at::Tensor& project_bias) {
  static const auto op = operator_named<decltype(ffn)>("mobilemamba::ffn");
  return op.call(input, residual, expand_weight, expand_bias, project_weight, project_bias);
}

FfnGradients ffn_backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& expand_weight,
                          const at::Tensor& expand_bias, const at::Tensor& project_weight,
                          const at::Tensor& project_bias) {
  static const auto op = operator_named<decltype(ffn_backward)>("mobilemamba::ffn_backward");
  return op.call(grad_output, input, expand_weight, expand_bias, project_weight, project_bias);
}

at::Tensor mrffi(const at::Tensor& input, const std::optional<at::Tensor>& residual, at::TensorList weights,
                 double eps) {
  static const auto op = operator_named<decltype(mrffi)>("mobilemamba::mrffi");
  return op.call(input, residual, weights, eps);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> mrffi_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                               at::TensorList weights, double eps) {
  static const auto op = operator_named<decltype(mrffi_backward)>("mobilemamba::mrffi_backward");
  return op.call(grad_output, input, weights, eps);
}

at::Tensor patch_embedding(const at::Tensor& input, at::TensorList weights, at::TensorList biases,
                           at::IntArrayRef strides) {
  static const auto op = operator_named<decltype(patch_embedding)>("mobilemamba::patch_embedding");
  return op.call(input, weights, biases, strides);
}

at::Tensor patch_merging(const at::Tensor& input, const at::Tensor& expand_weight, const at::Tensor& expand_bias,
                         const at::Tensor& depthwise_weight, const at::Tensor& depthwise_bias,
                         const at::Tensor& squeeze_weight, const at::Tensor& squeeze_bias,
                         const at::Tensor& excite_weight, const at::Tensor& excite_bias,
                         const at::Tensor& project_weight, const at::Tensor& project_bias) {
  static const auto op = operator_named<decltype(patch_merging)>("mobilemamba::patch_merging");
  return op.call(input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, squeeze_weight, squeeze_bias,
                 excite_weight, excite_bias, project_weight, project_bias);
}

std::vector<at::Tensor> backbone(const at::Tensor& input, at::TensorList weights, at::IntArrayRef strides,
                                 at::IntArrayRef depths, const std::optional<at::Tensor>& head_weight,
                                 const std::optional<at::Tensor>& head_bias, double eps) {
  static const auto op = operator_named<decltype(backbone)>("mobilemamba::backbone");
  return op.call(input, weights, strides, depths, head_weight, head_bias, eps);
}

}  // namespace mobilemamba
