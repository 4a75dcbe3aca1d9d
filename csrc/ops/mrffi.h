// Host side of the MRFFI block that its backends share: checks, outputs, composition.
#pragma once

#include <c10/util/FunctionRef.h>

#include <array>

#include "kernels/gate.h"
#include "ops/bidirectional_scan.h"
#include "ops/depthwise_conv2d.h"
#include "ops/haar_conv2d.h"

namespace mobilemamba {

using MrffiGradients = std::tuple<at::Tensor, std::vector<at::Tensor>>;

/// The weights by name, for C channels = G global + P local + identity, inner width D, rank R, state size N. Matrices
/// (out, in) have the input's type and may also be packed (pack_conv2d_weight); the others may be float32 beside it.
struct MrffiWeights {
  explicit MrffiWeights(at::TensorList list);

  static constexpr size_t count = 20;
  static constexpr bool is_matrix(size_t i) { return i == 0 || i == 4 || i == 11 || i == 18; }

  const at::Tensor &in_weight, &in_bias;              // (2D, G), (2D)
  const at::Tensor &conv_weight, &conv_bias;          // (D, 1, k, k), (D)
  const at::Tensor& x_weight;                         // (2 * (R + 2N), D)
  const at::Tensor &dt_weight, &dt_bias, &A_log, &D;  // as bidirectional_scan's
  const at::Tensor &norm_weight, &norm_bias;          // (D), (D)
  const at::Tensor &out_weight, &out_bias;            // (G, D), (G)
  const at::Tensor& wavelet_weight;                   // (G, 4, k, k)
  const at::Tensor &local_weight, &local_bias;        // (P, 1, k, k), (P)
  const at::Tensor &local_scale, &local_shift;        // (P), (P)
  const at::Tensor &proj_weight, &proj_bias;          // (C, C), (C)

  int64_t inner() const { return in_bias.size(0) / 2; }
  int64_t global() const { return out_bias.size(0); }
  int64_t local() const { return local_bias.size(0); }
};

struct MrffiArguments {
  const at::Tensor& input;
  const at::TensorList weights;
  double eps;

  void check(const std::optional<at::Tensor>& residual) const;
  void check_backward(const at::Tensor& grad_output) const;
  /// Uninitialised.
  at::Tensor output() const;
  MrffiGradients gradients() const;
};

/// relu(input @ weight.t() + bias + residual), each a (rows, channels) matrix with contiguous channels.
struct Product {
  const at::Tensor &input, &weight, &bias;
  const std::optional<at::Tensor>& residual;
  bool residual_inside, relu;
};

/// The operator on a backend's kernels.
struct MrffiBackend {
  ScanBackend scan;
  HaarBackend haar;
  DepthwiseBackend depthwise;
  void (*gate)(const GateForward&);
  /// Writes to `output`, which may be the residual.
  void (*product)(const Product&, at::Tensor output);
  /// Calls `run` with parts of a batch, each by its first image and how many they are, in any order or at once.
  void (*in_parts)(int64_t batch, int64_t positions, c10::function_ref<void(int64_t, int64_t)> run);

  /// For arguments that are checked.
  at::Tensor mrffi(const MrffiArguments& arguments, const std::optional<at::Tensor>& residual) const;

 private:
  /// All images are channels-last.
  void run(const MrffiArguments& arguments, const std::optional<at::Tensor>& residual, const at::Tensor& output) const;
};

/// The product by torch.
void product_with_torch(const Product& p, at::Tensor output);

/// The gradients, composed of the other operators and torch's.
MrffiGradients mrffi_backward_composed(const at::Tensor& grad_output, const MrffiArguments& arguments);

}  // namespace mobilemamba
