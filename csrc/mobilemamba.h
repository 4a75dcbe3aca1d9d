// The public C++ interface: the operators as functions. A program that links the library also registers them with
// torch. A function throws c10::Error, with one line that names the argument, if an argument does not fit: its shape,
// dtype or device; a kernel size beyond 32767, a stride beyond 2^31 - 1, a dimension beyond 2^32.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

#define MOBILEMAMBA_API __attribute__((visibility("default")))

namespace mobilemamba {

/// Selective scan of a sequence in both directions, summed; see mobilemamba/ops/operators.py for the formula.
/// u (B, D, L); delta (B, 2, R, L); A_log (2, D, N); B, C (B, 2, N, L); D (2, D); dt_weight (2, D, R); dt_bias (2, D).
/// Returns y (B, D, L), channels-last in memory.
MOBILEMAMBA_API at::Tensor bidirectional_scan(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log,
                                              const at::Tensor& B, const at::Tensor& C, const at::Tensor& D,
                                              const at::Tensor& dt_weight, const at::Tensor& dt_bias);

/// The gradients of bidirectional_scan's arguments, in their order.
using ScanGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
MOBILEMAMBA_API ScanGradients bidirectional_scan_backward(const at::Tensor& grad_y, const at::Tensor& u,
                                                          const at::Tensor& delta, const at::Tensor& A_log,
                                                          const at::Tensor& B, const at::Tensor& C, const at::Tensor& D,
                                                          const at::Tensor& dt_weight, const at::Tensor& dt_bias);

/// Haar transform, depthwise convolution of the sub-bands, inverse transform.
/// input (B, C, H, W); weight (4C, 1, k, k), k odd. Returns (B, C, H, W), channels-last in memory.
MOBILEMAMBA_API at::Tensor haar_conv2d(const at::Tensor& input, const at::Tensor& weight);

/// The gradient of haar_conv2d's weight, (4C, 1, k, k) in float32 (float64 for float64). The gradient of its input is
/// haar_conv2d of grad_output with the weight flipped in both of its last dimensions.
MOBILEMAMBA_API at::Tensor haar_conv2d_backward_weight(const at::Tensor& grad_output, const at::Tensor& input,
                                                       int64_t kernel_size);

/// activation(convolution of each channel with its own kernel + bias) + residual, with zero padding of k / 2.
/// input (B, C, H, W); weight (C, 1, k, k), k odd; bias (C); residual of the output's shape; activation "none", "relu"
/// or "silu". Returns (B, C, ceil(H / stride), ceil(W / stride)), channels-last in memory.
MOBILEMAMBA_API at::Tensor depthwise_conv2d(const at::Tensor& input, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias = std::nullopt,
                                            const std::optional<at::Tensor>& residual = std::nullopt,
                                            int64_t stride = 1, std::string_view activation = "none");

/// The gradients of depthwise_conv2d's input, weight and bias. Those of weight and bias are float32 (float64 for
/// float64); that of the bias is computed without a bias too. The gradient of the residual is grad_output.
MOBILEMAMBA_API std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_conv2d_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias, int64_t stride, std::string_view activation);

/// activation(convolution + bias) + residual, with zero padding of kernel_size / 2. The weight is in panels
/// (ceil(out / 32), ceil(in * kernel_size^2 / 2), 32, 2), from pack_conv2d_weight, or from quantize_conv2d_weight.
/// input (B, in, H, W); bias (out); residual of the output's shape; activation "none" or "relu". Returns (B, out,
/// ceil(H / stride), ceil(W / stride)), channels-last in memory.
MOBILEMAMBA_API at::Tensor packed_conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                                         const std::optional<at::Tensor>& residual = std::nullopt,
                                         int64_t kernel_size = 1, int64_t stride = 1,
                                         std::string_view activation = "none");

/// What conv_norm returns: the output, and what its gradients need: mean and unbiased variance of each channel, in the
/// accumulator type, and the convolution's output, which is empty for a depthwise convolution: that is computed again.
/// These three have no gradients.
using ConvNormResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// Convolution and batch normalisation in training: activation(norm(convolution)) + residual, where norm has the mean
/// and the variance of each channel over the batch. Zero padding of k / 2. input (B, in, H, W); weight (out, in, k, k),
/// or (in, 1, k, k) for a depthwise convolution; norm_weight and norm_bias (out); residual of the output's shape;
/// activation "none" or "relu". The output is (B, out, ceil(H / stride), ceil(W / stride)), channels-last in memory.
MOBILEMAMBA_API ConvNormResult conv_norm(const at::Tensor& input, const at::Tensor& weight,
                                         const at::Tensor& norm_weight, const at::Tensor& norm_bias,
                                         const std::optional<at::Tensor>& residual = std::nullopt, int64_t stride = 1,
                                         std::string_view activation = "none", double eps = 1e-5);

/// The gradients of conv_norm's input (empty without `input_gradient`), weight, norm_weight and norm_bias. The gradient
/// of the residual is grad_output.
using ConvNormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
MOBILEMAMBA_API ConvNormGradients conv_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& weight, const at::Tensor& norm_weight,
                                                     const at::Tensor& norm_bias, const at::Tensor& convolved,
                                                     const at::Tensor& mean, const at::Tensor& var, int64_t stride,
                                                     std::string_view activation, double eps, bool input_gradient);

/// What ffn_norm returns: the output; mean and unbiased variance of the hidden channels and of the output's, in the
/// accumulator type; and the two products before their norms. Only the output has gradients.
using FfnNormResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// The feed-forward layer in training: input + norm(project(ReLU(norm(expand(input))))), where each norm has the mean
/// and the variance of each channel over the batch. input (B, C, H, W); expand_weight (F, C, 1, 1); project_weight
/// (C, F, 1, 1); the norms' weights and biases (F) and (C). Returns (B, C, H, W), channels-last in memory.
MOBILEMAMBA_API FfnNormResult ffn_norm(const at::Tensor& input, const at::Tensor& expand_weight,
                                       const at::Tensor& expand_norm_weight, const at::Tensor& expand_norm_bias,
                                       const at::Tensor& project_weight, const at::Tensor& project_norm_weight,
                                       const at::Tensor& project_norm_bias, double expand_eps = 1e-5,
                                       double project_eps = 1e-5);

/// The gradients of ffn_norm's input and of its six parameters, which are `parameters` in their order. `saved` are the
/// products before their norms, then the means and variances in the order of the result.
using FfnNormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
MOBILEMAMBA_API FfnNormGradients ffn_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                   at::TensorList parameters, at::TensorList saved, double expand_eps,
                                                   double project_eps);

/// The packed form of a weight (out, in, k, k).
MOBILEMAMBA_API at::Tensor pack_conv2d_weight(const at::Tensor& weight);

/// The form of a weight (out, in, k, k) for products of 8-bit integers on the CPU, int8
/// (ceil(out / 32), ceil(in * k^2 / 4) + 3, 32, 4). It may stand wherever a packed weight may. Each output has a scale
/// of its own, the largest magnitude of its weights / 127. The operator rounds its input to
/// clamp(round(x / scale) + zero_point, 0, 255). Gradients do not pass it.
MOBILEMAMBA_API at::Tensor quantize_conv2d_weight(const at::Tensor& weight, double scale, int64_t zero_point);

/// The feed-forward layer with BatchNorm folded: input + project(ReLU(expand(input))) + residual.
/// input (B, C, H, W); expand_weight (F, C); expand_bias (F); project_weight (C, F); project_bias (C). The matrices may
/// be packed, as kernels of size 1. Returns (B, C, H, W), channels-last in memory.
MOBILEMAMBA_API at::Tensor ffn(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                               const at::Tensor& expand_weight, const at::Tensor& expand_bias,
                               const at::Tensor& project_weight, const at::Tensor& project_bias);

/// The gradients of ffn's input, weights and biases, in their order. The gradient of the residual is grad_output.
using FfnGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
MOBILEMAMBA_API FfnGradients ffn_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                          const at::Tensor& expand_weight, const at::Tensor& expand_bias,
                                          const at::Tensor& project_weight, const at::Tensor& project_bias);

/// MobileMamba's mixer with BatchNorm folded, plus `residual`. mobilemamba/ops/operators.py has the formula and the
/// order of the weights. input (B, C, H, W). Returns (B, C, H, W), channels-last in memory.
MOBILEMAMBA_API at::Tensor mrffi(const at::Tensor& input, const std::optional<at::Tensor>& residual,
                                 at::TensorList weights, double eps = 1e-5);

/// The gradients of mrffi's input and weights. The gradient of the residual is grad_output.
MOBILEMAMBA_API std::tuple<at::Tensor, std::vector<at::Tensor>> mrffi_backward(const at::Tensor& grad_output,
                                                                               const at::Tensor& input,
                                                                               at::TensorList weights, double eps);

/// The instruction set that the CPU kernels were chosen for on this machine: "generic", "avx2" or "avx512".
MOBILEMAMBA_API std::string_view cpu_kernels();

/// Patch embedding with BatchNorm folded: 3x3 convolutions with zero padding of 1, and a ReLU after each but the last.
/// input (B, C, H, W); weights[i] (out, in, 3, 3), plain or packed; biases[i] (out); one stride for each convolution.
/// Returns the output of the last convolution, channels-last in memory if the input is so or the weights are packed.
MOBILEMAMBA_API at::Tensor patch_embedding(const at::Tensor& input, at::TensorList weights, at::TensorList biases,
                                           at::IntArrayRef strides);

/// Patch merging with BatchNorm folded; see mobilemamba/ops/operators.py for the formula. input (B, C, H, W), hidden
/// width F, squeezed width S: expand_weight (F, C, 1, 1), depthwise_weight (F, 1, k, k), squeeze_weight (S, F, 1, 1),
/// excite_weight (F, S, 1, 1), project_weight (out, F, 1, 1). All but the depthwise weight may be packed. Each bias has
/// an element for each output. Returns (B, out, ceil(H / 2), ceil(W / 2)), channels-last in memory.
MOBILEMAMBA_API at::Tensor patch_merging(const at::Tensor& input, const at::Tensor& expand_weight,
                                         const at::Tensor& expand_bias, const at::Tensor& depthwise_weight,
                                         const at::Tensor& depthwise_bias, const at::Tensor& squeeze_weight,
                                         const at::Tensor& squeeze_bias, const at::Tensor& excite_weight,
                                         const at::Tensor& excite_bias, const at::Tensor& project_weight,
                                         const at::Tensor& project_bias);

/// The network with BatchNorm folded up to its feature maps, one for each stage; mobilemamba/ops/operators.py has the
/// order of the weights. input (B, C, H, W); one stride for each convolution of the patch embedding; the number of
/// blocks of each stage. On the CPU the threads are started once for all layers, not for each.
MOBILEMAMBA_API std::vector<at::Tensor> backbone(const at::Tensor& input, at::TensorList weights,
                                                 at::IntArrayRef strides, at::IntArrayRef depths,
                                                 const std::optional<at::Tensor>& head_weight = std::nullopt,
                                                 const std::optional<at::Tensor>& head_bias = std::nullopt,
                                                 double eps = 1e-5);

}  // namespace mobilemamba
