// Batch normalisation in training on the CPU; see the header.
#include "cpu/norm.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace mobilemamba::cpu {
namespace {

/// f(data) with the elements of a contiguous tensor of float32 or float64.
template <typename F>
auto with_elements(const at::Tensor& x, const F& f) {
  if (x.scalar_type() == at::kDouble) return f(static_cast<double*>(x.mutable_data_ptr()));
  return f(static_cast<float*>(x.mutable_data_ptr()));
}

at::Tensor empty_sums(at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, at::TensorOptions().dtype(accumulate_type(type)));
}

}  // namespace

PerChannel channels_of(const at::Tensor& parameter) {
  const at::Tensor x = parameter.to(accumulate_type(parameter.scalar_type())).contiguous();
  return with_elements(x, [&](const auto* data) { return PerChannel(data, data + x.numel()); });
}

NormLayout::NormLayout(at::ScalarType type, int64_t unit, int64_t channels)
    : type_(type), channels_(channels), joined_(most_joined / std::gcd(channels, most_joined)) {
  if (unit % joined_ != 0) joined_ = 1;
}

Rows NormLayout::rows(const at::Tensor& matrix, int64_t row) const {
  return rows(static_cast<const std::byte*>(matrix.const_data_ptr()) + row * channels_ * matrix.element_size());
}

at::Tensor NormLayout::parameters(std::initializer_list<const PerChannel*> values) const {
  const at::Tensor result = empty_sums({static_cast<int64_t>(values.size()), joined_ * channels_}, type_);
  with_elements(result, [&](auto* to) {
    for (const PerChannel* value : values)
      for (int64_t i = 0; i < joined_; ++i)
        to = std::copy(value->begin(), value->end(), to);
  });
  return result;
}

at::Tensor NormLayout::to_tensor(const PerChannel& values) const {
  const at::Tensor result = empty_sums({channels_}, type_);
  with_elements(result, [&](auto* to) { std::copy(values.begin(), values.end(), to); });
  return result;
}

at::Tensor NormLayout::sums(int64_t rows) const {
  return empty_sums({sizes(rows).blocks(), 2, joined_ * channels_}, type_);
}

void* NormLayout::sums_of(const at::Tensor& sums, int64_t row) const {
  const int64_t block = row / part_rows();
  return static_cast<std::byte*>(sums.mutable_data_ptr()) + block * sums.stride(0) * sums.element_size();
}

NormLayout::Moments NormLayout::join_moments(const at::Tensor& sums, int64_t rows) const {
  Moments joint{PerChannel(channels_), PerChannel(channels_)};
  double seen = 0;
  with_elements(sums, [&](const auto* from) {
    const int64_t width = joined_ * channels_;
    for (int64_t first = 0; first < rows / joined_; first += NormSizes::block_rows, from += 2 * width) {
      const double count = static_cast<double>(std::min(NormSizes::block_rows, rows / joined_ - first));
      for (int64_t i = 0; i < width; i += channels_, seen += count) {
        const double weight = count / (seen + count), between = seen * weight;
        for (int64_t c = 0; c < channels_; ++c) {
          const double difference = from[i + c] - joint.mean[c];
          joint.mean[c] += difference * weight;
          joint.var[c] += from[width + i + c] + difference * difference * between;
        }
      }
    }
  });
  for (double& squares : joint.var)
    squares /= seen - 1;
  return joint;
}

std::pair<PerChannel, PerChannel> NormLayout::join(const at::Tensor& sums) const {
  std::pair<PerChannel, PerChannel> joint{PerChannel(channels_), PerChannel(channels_)};
  with_elements(sums, [&](const auto* from) {
    for (int64_t block = 0; block < sums.size(0); ++block)
      for (PerChannel* to : {&joint.first, &joint.second})
        for (int64_t i = 0; i < joined_; ++i, from += channels_)
          for (int64_t c = 0; c < channels_; ++c)
            (*to)[c] += from[c];
  });
  return joint;
}

Norm::Norm(const at::Tensor& matrix, const NormLayout::Moments& moments, const at::Tensor& weight,
           const at::Tensor& bias, double eps, Activation activation, int64_t unit)
    : matrix_(matrix),
      layout_(matrix.scalar_type(), unit, matrix.size(1)),
      activation_(activation),
      scale_(channels_of(weight)),
      inverse_(scale_.size()) {
  const double rows = static_cast<double>(matrix.size(0)), biased = (rows - 1) / rows;
  PerChannel shift = channels_of(bias);
  for (size_t c = 0; c < scale_.size(); ++c) {
    inverse_[c] = 1 / std::sqrt(moments.var[c] * biased + eps);
    scale_[c] *= inverse_[c];
    shift[c] -= moments.mean[c] * scale_[c];
  }
  parameters_ = layout_.parameters({&scale_, &shift, &moments.mean});
}

const void* Norm::parameter(int64_t i) const {
  return static_cast<const std::byte*>(parameters_.const_data_ptr()) +
         i * parameters_.size(1) * parameters_.element_size();
}

NormForward Norm::forward(int64_t first, int64_t size, const void* residual, void* output) const {
  return {layout_.sizes(size),    activation_, layout_.rows(matrix_, first), parameter(0), parameter(1),
          layout_.rows(residual), output};
}

NormBackward Norm::backward(int64_t first, int64_t size, const at::Tensor& grad) const {
  return {layout_.sizes(size), activation_, layout_.rows(matrix_, first), layout_.rows(grad, first), parameter(0),
          parameter(1),        parameter(2)};
}

NormBackwardSums Norm::backward_sums(int64_t first, int64_t size, const at::Tensor& grad,
                                     const at::Tensor& sums) const {
  return {backward(first, size, grad), layout_.sums_of(sums, first)};
}

void Norm::solve(const at::Tensor& sums) {
  std::tie(grad_bias_, grad_weight_) = layout_.join(sums);
  const double rows = static_cast<double>(matrix_.size(0));
  PerChannel slope(scale_.size()), offset(scale_.size());
  for (size_t c = 0; c < scale_.size(); ++c) {
    grad_weight_[c] *= inverse_[c];
    slope[c] = -scale_[c] * inverse_[c] * grad_weight_[c] / rows;
    offset[c] = -scale_[c] * grad_bias_[c] / rows;
  }
  line_ = layout_.parameters({&slope, &offset});
}

NormBackwardInput Norm::backward_input(int64_t first, int64_t size, const at::Tensor& grad, void* grad_input) const {
  const auto* slope = static_cast<const std::byte*>(line_.const_data_ptr());
  return {backward(first, size, grad), slope, slope + line_.size(1) * line_.element_size(), grad_input};
}

}  // namespace mobilemamba::cpu
