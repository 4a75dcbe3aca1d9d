// The network up to its feature maps; see the header.
#include "ops/backbone.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>

#include "ops/composite.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba {
namespace {

/// The lengths of the layers' lists of weights.
constexpr size_t convolution_weights = 2, ffn_weights = 4, mrffi_weight_count = 20, merging_weights = 10;
constexpr size_t residual_weights = convolution_weights + ffn_weights;  // a depthwise convolution and an FFN
constexpr size_t block_weights = 2 * residual_weights + mrffi_weight_count;
constexpr size_t transition_weights = 2 * residual_weights + merging_weights;

/// Takes the weights of one layer after another from the list.
class Layers {
 public:
  explicit Layers(at::TensorList weights) : rest_(weights) {}

  at::TensorList take(size_t count) {
    const at::TensorList taken = rest_.slice(0, count);
    rest_ = rest_.slice(count);
    return taken;
  }

  at::Tensor embedding(const at::Tensor& x, at::IntArrayRef strides) {
    std::vector<at::Tensor> weights, biases;
    for (size_t i = 0; i < strides.size(); ++i) {
      const at::TensorList w = take(convolution_weights);
      weights.push_back(w[0]);
      biases.push_back(w[1]);
    }
    return patch_embedding(x, weights, biases, strides);
  }

  /// A depthwise convolution and the feed-forward layer.
  at::Tensor residual_layers(const at::Tensor& x, const std::optional<at::Tensor>& residual = std::nullopt) {
    const at::TensorList conv = take(convolution_weights), w = take(ffn_weights);
    return ffn(depthwise_conv2d(x, conv[0], conv[1]), residual, w[0], w[1], w[2], w[3]);
  }

  at::Tensor transition(const at::Tensor& x) {
    const at::Tensor narrow = residual_layers(x);
    const at::TensorList w = take(merging_weights);
    return residual_layers(patch_merging(narrow, w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9]));
  }

  at::Tensor block(const at::Tensor& x, double eps) {
    const at::Tensor y = residual_layers(x);
    const at::Tensor mixed = mrffi(y, y, take(mrffi_weight_count), eps);
    return residual_layers(mixed, x);
  }

 private:
  at::TensorList rest_;
};

}  // namespace

void BackboneArguments::check() const {
  const Checks check("backbone", "input", input);
  check_dense_image(check, "input", input);
  TORCH_CHECK(!strides.empty(), "backbone: strides has 0 values, expected at least 1");
  TORCH_CHECK(!depths.empty(), "backbone: depths has 0 values, expected at least 1");
  for (size_t i = 0; i < strides.size(); ++i)
    check_stride("backbone", c10::str("strides[", i, "]").c_str(), strides[i]);
  size_t expected = strides.size() * convolution_weights + (depths.size() - 1) * transition_weights;
  for (size_t i = 0; i < depths.size(); ++i) {
    const int64_t most = static_cast<int64_t>(weights.size() / block_weights);
    TORCH_CHECK(depths[i] >= 0 && depths[i] <= most, "backbone: depths[", i, "] is ", depths[i], ", expected 0 to ",
                most, " for ", weights.size(), " weights");
    expected += static_cast<size_t>(depths[i]) * block_weights;
  }
  TORCH_CHECK(weights.size() == expected, "backbone: weights has ", weights.size(), " tensors, expected ", expected,
              " for strides ", strides, " and depths ", depths);
  TORCH_CHECK(head_weight.has_value() == head_bias.has_value(), "backbone: head_weight is ",
              head_weight ? "a tensor" : "None", " and head_bias is ", head_bias ? "a tensor" : "None",
              ", expected both or none");
  if (head_bias) check.dimensions("head_bias", *head_bias, 1, "(num_classes)");
}

std::vector<at::Tensor> BackboneArguments::outputs() const {
  constexpr size_t transition_out = transition_weights - 1, embedding_out = 1;  // a bias of the output's channels
  c10::SymInt height = input.sym_size(2), width = input.sym_size(3);
  for (const int64_t stride : strides) {
    height = ceil_div(height, stride);
    width = ceil_div(width, stride);
  }
  size_t at = (strides.size() - 1) * convolution_weights;
  c10::SymInt channels = weights[at + embedding_out].sym_size(0);
  at += convolution_weights;
  std::vector<at::Tensor> maps;
  for (size_t i = 0; i < depths.size(); ++i) {
    if (i > 0) {
      height = ceil_div(height, 2);
      width = ceil_div(width, 2);
      channels = weights[at + transition_out].sym_size(0);
      at += transition_weights;
    }
    at += static_cast<size_t>(depths[i]) * block_weights;
    maps.push_back(at::empty_symint({input.sym_size(0), channels, height, width}, input.options(),
                                    at::MemoryFormat::ChannelsLast));
  }
  if (head_bias) maps.push_back(at::empty_symint({input.sym_size(0), head_bias->sym_size(0)}, input.options()));
  return maps;
}

std::vector<at::Tensor> backbone_composed(const BackboneArguments& a) {
  a.check();
  Layers layers(a.weights);
  const at::Tensor images = a.input.movedim(1, -1).contiguous().movedim(-1, 1);  // channels-last
  at::Tensor x = layers.embedding(images, a.strides);
  std::vector<at::Tensor> maps;
  for (size_t i = 0; i < a.depths.size(); ++i) {
    if (i > 0) x = layers.transition(x);
    for (int64_t block = 0; block < a.depths[i]; ++block)
      x = layers.block(x, a.eps);
    maps.push_back(x);
  }
  if (a.head_bias)
    maps.push_back(dense_conv2d(x.mean({2, 3}, true), *a.head_weight, *a.head_bias, 1, 1, "none").flatten(1));
  return maps;
}

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  m.impl("backbone", kernel_of<backbone, backbone_composed>);
}

}  // namespace mobilemamba
