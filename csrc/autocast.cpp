// Autocast: activations and the matrices that multiply them are cast to the lower type; other parameters are cast to
// float32, which the operators take beside 16-bit activations.
#include <ATen/autocast_mode.h>

#include "mobilemamba.h"
#include "ops/backbone.h"
#include "ops/kernel_of.h"
#include "ops/mrffi.h"
#include "registration.h"

namespace mobilemamba::autocast {
namespace {

using at::Tensor;

/// The type that an argument is cast to: the lower type, or float32. Arguments that are no tensors stay as they are.
enum Cast { lower, keep, none };

template <c10::DeviceType device>
class Autocast {
  static at::ScalarType type(Cast cast) {
    return cast == lower ? at::autocast::get_autocast_dtype(device) : at::kFloat;
  }

  static Tensor convert(Cast cast, const Tensor& x) { return at::autocast::cached_cast(type(cast), x, device); }
  static std::optional<Tensor> convert(Cast cast, const std::optional<Tensor>& x) {
    return at::autocast::cached_cast(type(cast), x, device);
  }
  static std::vector<Tensor> convert(Cast cast, at::TensorList list) {
    return at::autocast::cached_cast(type(cast), list, device);
  }
  template <typename T>
  static T convert(Cast, T x) {
    return x;
  }

  template <auto op, typename Operator, Cast... casts>
  struct Kernel;

  template <auto op, typename Result, typename... Args, Cast... casts>
  struct Kernel<op, Result (*)(Args...), casts...> {
    static_assert(sizeof...(Args) == sizeof...(casts));
    static Result call(Args... args) {
      const c10::impl::ExcludeDispatchKeyGuard below(at::autocast::get_autocast_dispatch_key_from_device_type(device));
      return op(convert(casts, args)...);
    }
  };

  /// Calls `op` with its arguments cast; `casts` has their order.
  template <auto op, Cast... casts>
  static constexpr auto kernel = &Kernel<op, decltype(op), casts...>::call;

  static Tensor mixer(const Tensor& input, const std::optional<Tensor>& residual, at::TensorList weights, double eps) {
    const c10::impl::ExcludeDispatchKeyGuard below(at::autocast::get_autocast_dispatch_key_from_device_type(device));
    MrffiWeights w(weights);
    for (const MrffiWeight& weight : mrffi_weights)
      w.*weight.tensor = convert(weight.kind == MrffiWeight::Kind::matrix ? lower : keep, w.*weight.tensor);
    return mrffi(convert(lower, input), convert(lower, residual), w.list(), eps);
  }

 public:
  static void register_kernels(torch::Library& m) {
    m.impl("backbone", kernel_of<backbone, backbone_composed>);  // each layer casts its own arguments
    m.impl("ffn", kernel<ffn, lower, lower, lower, keep, lower, keep>);
    m.impl("mrffi", mixer);
    m.impl("bidirectional_scan", kernel<bidirectional_scan, lower, lower, keep, lower, lower, keep, keep, keep>);
    m.impl("haar_conv2d", kernel<haar_conv2d, lower, keep>);
    m.impl("depthwise_conv2d", kernel<depthwise_conv2d, lower, keep, keep, lower, none, none>);
    m.impl("conv_norm", kernel<conv_norm, lower, lower, keep, keep, lower, none, none, none>);
    m.impl("ffn_norm", kernel<ffn_norm, lower, lower, keep, keep, lower, keep, keep, none, none>);
    m.impl("packed_conv2d", kernel<packed_conv2d, lower, lower, keep, lower, none, none, none>);
    m.impl("patch_embedding", kernel<patch_embedding, lower, lower, keep, none>);
    m.impl("patch_merging",
           kernel<patch_merging, lower, lower, keep, keep, keep, lower, keep, lower, keep, lower, keep>);
  }
};

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(AutocastCPU, m) {
  Autocast<at::kCPU>::register_kernels(m);
}

MOBILEMAMBA_LIBRARY_IMPL(AutocastCUDA, m) {
  Autocast<at::kCUDA>::register_kernels(m);
}

}  // namespace mobilemamba::autocast
