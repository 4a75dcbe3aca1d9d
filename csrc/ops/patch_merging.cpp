// Patch merging with BatchNorm folded, composed of convolutions and squeeze-excite.
#include <ATen/TensorOperators.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sigmoid.h>

#include "mobilemamba.h"
#include "ops/composite.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba {
namespace {

/// Images per part on the CPU. With fewer, the weights of squeeze-excite (1.2 MB in float32 at the first merging of s6)
/// are read too often. With more, the activations grow to 19 MB for 32 images of s6 at 224 x 224, which glibc returns
/// to the system after each pass in some processes: 9400 page faults. Measured there for s6 at batch 32 on 2 cores of
/// an AMD EPYC with AVX2: the network takes 287 ms without parts, 273 ms with parts of 8.
constexpr int64_t merging_part_images = 8;

constexpr int64_t merging_stride = 2;

/// The operator's arguments, in the order of its schema.
struct MergingArguments {
  at::Tensor input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, squeeze_weight, squeeze_bias,
      excite_weight, excite_bias, project_weight, project_bias;
};

void check(const MergingArguments& a) {
  const Checks check("patch_merging", "input", a.input);
  check_dense_image(check, "input", a.input);
  const auto dense = [&](const char* weight_name, const at::Tensor& weight, const char* bias_name,
                         const at::Tensor& bias, const c10::SymInt& in) {
    return check_dense_conv2d(check, weight_name, weight, bias_name, bias, in, 1);
  };
  const c10::SymInt hidden = dense("expand_weight", a.expand_weight, "expand_bias", a.expand_bias, a.input.sym_size(1));
  check.kernel("depthwise_weight", a.depthwise_weight, hidden, 1, "(hidden, 1, k, k)");
  check.parameter("depthwise_bias", a.depthwise_bias, {hidden}, "(hidden)");
  const c10::SymInt squeezed = dense("squeeze_weight", a.squeeze_weight, "squeeze_bias", a.squeeze_bias, hidden);
  check.parameter("excite_bias", a.excite_bias, {hidden}, "(hidden)");
  dense("excite_weight", a.excite_weight, "excite_bias", a.excite_bias, squeezed);
  dense("project_weight", a.project_weight, "project_bias", a.project_bias, hidden);
}

at::Tensor merge(const MergingArguments& a) {
  check(a);
  return in_parts(a.input, merging_part_images, [&](const at::Tensor& images) {
    at::Tensor x = dense_conv2d(images, a.expand_weight, a.expand_bias, 1, 1, "relu");
    x = depthwise_conv2d(x, a.depthwise_weight, a.depthwise_bias, std::nullopt, merging_stride, "relu");
    const at::Tensor squeezed = dense_conv2d(x.mean({2, 3}, true), a.squeeze_weight, a.squeeze_bias, 1, 1, "relu");
    x = x * dense_conv2d(squeezed, a.excite_weight, a.excite_bias, 1, 1, "none").sigmoid();
    return dense_conv2d(x, a.project_weight, a.project_bias, 1, 1, "none");
  });
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CompositeImplicitAutograd, m) {
  m.impl("patch_merging", kernel_of<patch_merging, merge>);
}

}  // namespace mobilemamba
