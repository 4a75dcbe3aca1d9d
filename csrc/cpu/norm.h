// Batch normalisation in training on the CPU: its kernels on matrices, and what joins the sums of their blocks.
#pragma once

#include <initializer_list>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "ops/common.h"

namespace mobilemamba::cpu {

/// Values of the channels.
using PerChannel = std::vector<double>;

PerChannel channels_of(const at::Tensor& parameter);

/// Contiguous matrices (rows, channels) of one norm as the kernels see them. Where the channels do not fill whole
/// vectors, the kernels see several rows as one.
class NormLayout {
 public:
  /// The most rows that the kernels see as one. 16 elements are whole vectors of every instruction set.
  static constexpr int64_t most_joined = 16;

  /// The number of rows is a multiple of `unit`.
  NormLayout(at::ScalarType type, int64_t unit, int64_t channels);

  /// The parts of a matrix that are normalised one after another have a multiple of this number of rows, but the last.
  int64_t part_rows() const { return joined_ * NormSizes::block_rows; }
  NormSizes sizes(int64_t rows) const { return {kernel_dtype(type_), rows / joined_, channels_ * joined_}; }
  Rows rows(const void* data) const { return {data, channels_ * joined_}; }
  /// The rows from `row` on of a contiguous matrix.
  Rows rows(const at::Tensor& matrix, int64_t row) const;

  /// (values, joined * C) in the accumulator type; the kernels' parameters.
  at::Tensor parameters(std::initializer_list<const PerChannel*> values) const;
  at::Tensor to_tensor(const PerChannel& values) const;

  /// Uninitialised sums (blocks, 2, joined * C) of the blocks of all rows, and those from `row` on.
  at::Tensor sums(int64_t rows) const;
  void* sums_of(const at::Tensor& sums, int64_t row) const;

  struct Moments {         // of the channels
    PerChannel mean, var;  // var is unbiased
  };
  Moments join_moments(const at::Tensor& sums, int64_t rows) const;
  std::pair<PerChannel, PerChannel> join(const at::Tensor& sums) const;

 private:
  at::ScalarType type_;
  int64_t channels_, joined_;
};

/// The norm of a contiguous matrix (rows, channels), with an activation. Its functions compute rows [first, first +
/// size), where `first` is a multiple of layout().part_rows().
class Norm {
 public:
  /// With the moments from the forward pass. `first` and `size` of the functions may also be multiples of `unit`.
  Norm(const at::Tensor& matrix, const NormLayout::Moments& moments, const at::Tensor& weight, const at::Tensor& bias,
       double eps, Activation activation, int64_t unit);

  const NormLayout& layout() const { return layout_; }
  NormForward forward(int64_t first, int64_t size, const void* residual, void* output) const;

  /// The parameters of the kernel whose sums `solve` needs. `grad` are all rows of the output's gradient.
  NormBackwardSums backward_sums(int64_t first, int64_t size, const at::Tensor& grad, const at::Tensor& sums) const;
  /// From the sums of all blocks: the gradients of weight and bias, and what the gradient of the matrix depends on.
  void solve(const at::Tensor& sums);
  NormBackwardInput backward_input(int64_t first, int64_t size, const at::Tensor& grad, void* grad_input) const;
  at::Tensor grad_weight() const { return layout_.to_tensor(grad_weight_); }
  at::Tensor grad_bias() const { return layout_.to_tensor(grad_bias_); }

 private:
  NormBackward backward(int64_t first, int64_t size, const at::Tensor& grad) const;
  /// A row of the kernels' parameters: scale, shift, mean.
  const void* parameter(int64_t i) const;

  at::Tensor matrix_;
  NormLayout layout_;
  Activation activation_;
  PerChannel scale_, inverse_;  // inverse: 1 / sqrt(variance + eps)
  at::Tensor parameters_, line_;
  PerChannel grad_weight_, grad_bias_;
};

}  // namespace mobilemamba::cpu
