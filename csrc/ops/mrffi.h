// The host side of the MRFFI block, shared by its backends: the list of weights, checks, outputs, composition.
#pragma once

#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include <array>

#include "kernels/conv_product.h"
#include "kernels/gate.h"
#include "ops/bidirectional_scan.h"
#include "ops/depthwise_conv2d.h"
#include "ops/haar_conv2d.h"
#include "ops/product.h"

namespace mobilemamba {

using MrffiGradients = std::tuple<at::Tensor, std::vector<at::Tensor>>;

/// The weights, for C channels = G global + P local + identity, inner width D, rank R and state size N of the scan.
struct MrffiWeights {
  at::Tensor in_weight, in_bias;            // (2D, G), (2D)
  at::Tensor conv_weight, conv_bias;        // (D, 1, k, k), (D)
  at::Tensor x_weight;                      // (2 * (R + 2N), D)
  at::Tensor dt_weight, dt_bias, A_log, D;  // as bidirectional_scan's
  at::Tensor norm_weight, norm_bias;        // (D), (D)
  at::Tensor out_weight, out_bias;          // (G, D), (G)
  at::Tensor wavelet_weight;                // (G, 4, k, k)
  at::Tensor local_weight, local_bias;      // (P, 1, k, k), (P)
  at::Tensor local_scale, local_shift;      // (P), (P)
  at::Tensor proj_weight, proj_bias;        // (C, C), (C)

  MrffiWeights() = default;
  /// From the operator's list, and back.
  explicit MrffiWeights(at::TensorList list);
  std::vector<at::Tensor> list() const;

  int64_t inner() const { return in_bias.size(0) / 2; }
  int64_t rank() const { return dt_weight.size(2); }
  int64_t state() const { return A_log.size(2); }
  int64_t global() const { return out_bias.size(0); }
  int64_t local() const { return local_bias.size(0); }
};

/// C, G, P, D, R and N, which may be symbolic.
struct MrffiSizes {
  c10::SymInt channels, global, local, inner, rank, state;
};

/// One weight in the operator's list.
struct MrffiWeight {
  enum class Kind {
    matrix,     // (out, in) in the input's dtype, plain or packed (pack_conv2d_weight)
    kernel,     // (channels, planes, k, k) with k odd, in the input's dtype, or float32 beside a 16-bit input
    parameter,  // in the input's dtype, or float32 beside a 16-bit input
  };
  const char* name;
  at::Tensor MrffiWeights::* tensor;
  Kind kind;
  const char* layout;
  c10::SmallVector<c10::SymInt, 3> (*sizes)(const MrffiSizes&);  // for a kernel without k
};

/// The weights in the operator's order. MRFFI_WEIGHTS in mobilemamba/ops/operators.py has the same names; a test
/// compares them.
extern const std::array<MrffiWeight, 20> mrffi_weights;

struct MrffiArguments {
  at::Tensor input;
  MrffiWeights weights;
  double eps;

  void check(const std::optional<at::Tensor>& residual) const;
  void check_backward(const at::Tensor& grad_output) const;
  /// Uninitialised.
  MrffiGradients gradients() const;
};

/// The operator on a backend's kernels.
struct MrffiBackend {
  ScanBackend scan;
  HaarBackend haar;
  DepthwiseBackend depthwise;
  void (*gate)(const GateForward&);
  // Two steps in one launch: the convolution and the projection to delta, B and C; the gate, the output product and the
  // ReLU of the identity part. They return false, and compute nothing, where there is no kernel for it. May be null.
  bool (*conv_product)(const ConvProduct&);
  bool (*gate_product)(const GateProduct&);
  ProductFunction product;
  /// Calls `run` with parts of a batch, each given by its first image and its number of images. The calls may come in
  /// any order and at the same time.
  void (*in_parts)(int64_t batch, int64_t positions, c10::function_ref<void(int64_t, int64_t)> run);

  /// Expects checked arguments.
  at::Tensor mrffi(const MrffiArguments& arguments, const std::optional<at::Tensor>& residual) const;

 private:
  /// Expects channels-last images. The residual may be undefined.
  void run(const at::Tensor& input, const at::Tensor& residual, const MrffiWeights& w, double eps,
           const at::Tensor& output) const;
};

/// The gradients, composed of the other operators and torch's.
MrffiGradients mrffi_backward_composed(const at::Tensor& grad_output, const MrffiArguments& arguments);

}  // namespace mobilemamba
