// Under autocast, what flows along the sequence or the image takes the lower precision; parameters keep theirs.
#include <ATen/autocast_mode.h>

#include "mobilemamba.h"
#include "ops/mrffi.h"
#include "registration.h"

namespace mobilemamba::autocast {
namespace {

using at::Tensor;

template <c10::DeviceType device>
Tensor cast(const Tensor& x) {
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), x, device);
}

/// Parameters stay in float32, where the operators take them beside any lower precision.
template <c10::DeviceType device>
Tensor parameter(const Tensor& x) {
  return at::autocast::cached_cast(at::kFloat, x, device);
}

template <c10::DeviceType device>
std::optional<Tensor> cast(const std::optional<Tensor>& x) {
  return x ? std::optional(cast<device>(*x)) : x;
}

template <c10::DeviceType device>
std::optional<Tensor> parameter(const std::optional<Tensor>& x) {
  return x ? std::optional(parameter<device>(*x)) : x;
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor scan(const Tensor& u, const Tensor& delta, const Tensor& A_log, const Tensor& B, const Tensor& C,
            const Tensor& D, const Tensor& dt_weight, const Tensor& dt_bias) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  return bidirectional_scan(cast<device>(u), cast<device>(delta), parameter<device>(A_log), cast<device>(B),
                            cast<device>(C), parameter<device>(D), parameter<device>(dt_weight),
                            parameter<device>(dt_bias));
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor haar(const Tensor& input, const Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  return haar_conv2d(cast<device>(input), parameter<device>(weight));
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor depthwise(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, int64_t stride, std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  return depthwise_conv2d(cast<device>(input), parameter<device>(weight), parameter<device>(bias),
                          cast<device>(residual), stride, activation);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor packed_conv(const Tensor& input, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual,
                   int64_t kernel_size, int64_t stride, std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  return packed_conv2d(cast<device>(input), cast<device>(weight), parameter<device>(bias), cast<device>(residual),
                       kernel_size, stride, activation);
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor feed_forward(const Tensor& input, const std::optional<Tensor>& residual, const Tensor& expand_weight,
                    const Tensor& expand_bias, const Tensor& project_weight, const Tensor& project_bias) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  return ffn(cast<device>(input), cast<device>(residual), cast<device>(expand_weight), parameter<device>(expand_bias),
             cast<device>(project_weight), parameter<device>(project_bias));
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor mixer(const Tensor& input, const std::optional<Tensor>& residual, at::TensorList weights, double eps) {
  const c10::impl::ExcludeDispatchKeyGuard below(key);
  std::vector<Tensor> cast_weights;
  for (size_t i = 0; i < weights.size(); ++i)
    cast_weights.push_back(MrffiWeights::is_matrix(i) ? cast<device>(weights[i]) : parameter<device>(weights[i]));
  return mrffi(cast<device>(input), cast<device>(residual), cast_weights, eps);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("ffn", feed_forward<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("mrffi", mixer<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("bidirectional_scan", scan<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("haar_conv2d", haar<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("depthwise_conv2d", depthwise<at::kCPU, c10::DispatchKey::AutocastCPU>);
  m.impl("packed_conv2d", packed_conv<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

MOBILEMAMBA_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("ffn", feed_forward<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("mrffi", mixer<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("bidirectional_scan", scan<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("haar_conv2d", haar<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("depthwise_conv2d", depthwise<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("packed_conv2d", packed_conv<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace mobilemamba::autocast
