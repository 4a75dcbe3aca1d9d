// The host side of the network up to its feature maps, shared by its backends: the list of weights, checks, shapes,
// composition.
#pragma once

#include "mobilemamba.h"
#include "ops/common.h"

namespace mobilemamba {

/// The operator's arguments, in the order of its schema.
struct BackboneArguments {
  at::Tensor input;
  at::TensorList weights;
  at::IntArrayRef strides, depths;
  std::optional<at::Tensor> head_weight, head_bias;
  double eps;

  /// The number and the device of the weights. Shapes are checked layer by layer.
  void check() const;
  /// The feature maps and the head's output, uninitialised.
  std::vector<at::Tensor> outputs() const;
};

/// Calls the layers' operators one after another.
std::vector<at::Tensor> backbone_composed(const BackboneArguments& arguments);

}  // namespace mobilemamba
