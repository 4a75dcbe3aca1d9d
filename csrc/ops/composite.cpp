// Dense convolutions and parts of a batch; see the header.
#include "ops/composite.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/split.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "ops/packed_conv2d.h"

namespace mobilemamba {
namespace {

/// Whether `x` holds elements in CPU memory and no mode records or transforms operators. A fake, functional, batched or
/// traced tensor may stand for a batch of another size, so a graph must not contain the parts of this one.
bool is_plain_cpu(const at::Tensor& x) {
#ifdef HOST_CUDA  // the tests' stand-in for CUDA: its tensors are in CPU memory
  return false;
#endif
  static constexpr c10::DispatchKeySet transforms(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Functionalize,
       c10::DispatchKey::Tracer, c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
       c10::DispatchKey::FuncTorchDynamicLayerFrontMode});
  const c10::DispatchKeySet keys = x.key_set() | c10::impl::tls_local_dispatch_key_set().included_;
  return x.device().is_cpu() && !keys.has_any(transforms);
}

}  // namespace

at::Tensor dense_conv2d(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int64_t kernel_size,
                        int64_t stride, const char* activation) {
  if (is_packed(weight)) return packed_conv2d(input, weight, bias, std::nullopt, kernel_size, stride, activation);
  at::Tensor y = conv2d_with_torch(input, weight, bias, stride);
  return std::string_view(activation) == "relu" ? y.relu_() : y;
}

void check_dense_image(const Checks& check, const char* name, const at::Tensor& image) {
  check.dimensions(name, image, 4, image_layout);
  check.at_least_one("channels", image.sym_size(1), name, image);
  check.at_least_one("a height", image.sym_size(2), name, image);
  check.at_least_one("a width", image.sym_size(3), name, image);
}

c10::SymInt check_dense_conv2d(const Checks& check, const char* weight_name, const at::Tensor& weight,
                               const char* bias_name, const at::Tensor& bias, const c10::SymInt& in,
                               int64_t kernel_size) {
  check.dimensions(bias_name, bias, 1, "(out_channels)");
  const c10::SymInt out = bias.sym_size(0);
  check.at_least_one("out_channels", out, bias_name, bias);
  check.parameter(bias_name, bias, {out}, "(out_channels)");
  check.dimensions(weight_name, weight, 4, "(out_channels, in_channels, k, k)");
  if (is_packed(weight))
    check_packed(check, weight_name, weight, out, in * (kernel_size * kernel_size));
  else
    check.like_main(weight_name, weight, {out, in, kernel_size, kernel_size}, "(out_channels, in_channels, k, k)");
  return out;
}

at::Tensor in_parts(const at::Tensor& input, int64_t images, c10::function_ref<at::Tensor(const at::Tensor&)> layers) {
  if (!is_plain_cpu(input) || input.size(0) <= images) return layers(input);
  std::vector<at::Tensor> parts = input.split(images);
  for (at::Tensor& part : parts)
    part = layers(part);
  return at::cat(parts);
}

}  // namespace mobilemamba
