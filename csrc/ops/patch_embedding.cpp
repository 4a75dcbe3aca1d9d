// Patch embedding with BatchNorm folded, composed of convolutions.
#include "mobilemamba.h"
#include "ops/composite.h"
#include "registration.h"

namespace mobilemamba {
namespace {

constexpr int64_t embedding_kernel_size = 3;

/// Images per part on the CPU. With more, the activations leave the cache: after the first convolution of s6 an image
/// of 224 x 224 has 1.2 MB of them in float32. Measured for s6 at batch 32 in float32 on 2 cores of an Intel Xeon with
/// AMX: 39 ms without parts, 30 ms with parts of 4; no difference in bfloat16.
constexpr int64_t embedding_part_images = 4;

void check(const at::Tensor& input, at::TensorList weights, at::TensorList biases, at::IntArrayRef strides) {
  const Checks check("patch_embedding", "input", input);
  check_dense_image(check, "input", input);
  TORCH_CHECK(!weights.empty(), "patch_embedding: weights has 0 tensors, expected at least 1");
  TORCH_CHECK(biases.size() == weights.size(), "patch_embedding: biases has ", biases.size(), " tensors, expected ",
              weights.size(), " like weights");
  TORCH_CHECK(strides.size() == weights.size(), "patch_embedding: strides has ", strides.size(), " values, expected ",
              weights.size(), " like weights");
  c10::SymInt channels = input.sym_size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string weight = c10::str("weights[", i, "]"), bias = c10::str("biases[", i, "]");
    channels =
        check_dense_conv2d(check, weight.c_str(), weights[i], bias.c_str(), biases[i], channels, embedding_kernel_size);
    check_stride("patch_embedding", c10::str("strides[", i, "]").c_str(), strides[i]);
  }
}

at::Tensor embed(const at::Tensor& input, at::TensorList weights, at::TensorList biases, at::IntArrayRef strides) {
  check(input, weights, biases, strides);
  return in_parts(input, embedding_part_images, [&](const at::Tensor& images) {
    at::Tensor x = images;
    for (size_t i = 0; i < weights.size(); ++i)
      x = dense_conv2d(x, weights[i], biases[i], embedding_kernel_size, strides[i],
                       i + 1 < weights.size() ? "relu" : "none");
    return x;
  });
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CompositeImplicitAutograd, m) {
  m.impl("patch_embedding", embed);
}

}  // namespace mobilemamba
