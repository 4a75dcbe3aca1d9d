// Matrix products before a norm; see the header.
#include "cpu/norm_product.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include <algorithm>

#include "cpu/backends.h"
#include "cpu/run.h"

namespace mobilemamba::cpu {
namespace {

/// Elements of a part's input and output: 768 KiB in float32, which the L3 cache holds for each thread.
constexpr int64_t part_elements = 3 << 16;
/// With fewer rows in a part, torch's product spends too much of its time on packing the weight.
constexpr int64_t part_least_rows = 256;
/// The least number of parts, unless they would be too small; the most partial sums of a weight's gradient.
constexpr int64_t least_parts = 4, most_slabs = 8;

/// Whether products are our kernels': torch's are faster in 16 bits, and in float32 as fast where MKL has this
/// processor's instructions, which it has not on AMD's with AVX-512.
bool has_kernel(const at::Tensor& matrix) {
  return matrix.scalar_type() == at::kFloat;
}

/// A matrix (in, out) in the order of pack_conv2d_weight, in a third of its time: a training step packs all weights.
at::Tensor in_panels(const at::Tensor& right) {
  constexpr int64_t panel = PackedConvForward::panel;
  const int64_t in = right.size(0), out = right.size(1), pairs = ceil_div(in, 2), panels = ceil_div(out, panel);
  const int64_t from_input = right.stride(0), from_output = right.stride(1);
  const float* const from = right.const_data_ptr<float>();
  const at::Tensor packed = at::empty({panels, pairs, panel, 2}, right.options());
  parallel(panels, 0, [&](int64_t begin, int64_t end, std::byte*) {
    for (int64_t i = begin; i < end; ++i) {
      const float* const first = from + i * panel * from_output;
      float* const to = packed.mutable_data_ptr<float>() + i * pairs * panel * 2;
      const int64_t outputs = std::min(panel, out - i * panel);
      if (outputs < panel || in % 2) std::fill_n(to, pairs * panel * 2, 0.0f);
      if (from_output == 1)
        for (int64_t k = 0; k < in; ++k)
          for (int64_t j = 0; j < outputs; ++j)
            to[k / 2 * panel * 2 + 2 * j + k % 2] = first[k * from_input + j];
      else
        for (int64_t j = 0; j < outputs; ++j)
          for (int64_t k = 0; k < in; ++k)
            to[k / 2 * panel * 2 + 2 * j + k % 2] = first[k * from_input + j * from_output];
    }
  });
  return packed;
}

int64_t rows_of_part(int64_t rows, int64_t in, int64_t out) {
  return std::max(part_least_rows, std::min(part_elements / (in + out), rows / least_parts));
}

}  // namespace

Parts::Parts(int64_t rows, int64_t in, int64_t out, int64_t multiple) {
  // an even number of parts of about equal size, for two threads; the last one has the rows after the last multiple
  const int64_t units = rows / multiple, pairs = rows / (2 * rows_of_part(rows, in, out));
  const int64_t parts = std::clamp<int64_t>(2 * std::max<int64_t>(1, pairs), 1, std::max<int64_t>(1, units));
  for (int64_t i = 0; i < parts; ++i)
    bounds_.push_back(units * i / parts * multiple);
  bounds_.push_back(rows);
}

Parts Parts::of_images(int64_t images, int64_t rows_of_image, int64_t in, int64_t out) {
  constexpr int64_t multiple = NormLayout::most_joined;
  const int64_t wanted = ceil_div(rows_of_part(images * rows_of_image, in, out), multiple) * multiple;
  const int64_t together = std::clamp<int64_t>(wanted / rows_of_image, 1, ceil_div(images, least_parts));
  const int64_t of_image = together > 1 ? 1 : ceil_div(rows_of_image, wanted);
  std::vector<int64_t> bounds;
  for (int64_t first = 0; first < images; first += together)
    for (int64_t i = 0; i < of_image; ++i)
      bounds.push_back(first * rows_of_image + i * wanted);
  bounds.push_back(images * rows_of_image);
  return {std::move(bounds), of_image};
}

ProductWeight::ProductWeight(const at::Tensor& right) {
  if (has_kernel(right))
    packed_ = in_panels(right);
  else
    right_ = right;
}

void ProductWeight::multiply(const at::Tensor& x, const at::Tensor& to, const at::Tensor& added) const {
  at::Tensor result = to;
  if (!packed_.defined()) {
    added.defined() ? at::addmm_out(result, added, x, right_) : at::mm_out(result, x, right_);
    return;
  }
  const PackedConvForward p = {
      .dtype = kernel_dtype(x.scalar_type()),
      .batch = 1,
      .in_channels = x.size(1),
      .height = 1,
      .width = x.size(0),
      .out_channels = to.size(1),
      .kernel = 1,
      .stride = 1,
      .activation = Activation::none,
      .residual_inside = false,
      .input = {x.const_data_ptr(), 0, 0, x.stride(0)},
      .weight = packed_.const_data_ptr(),
      .bias = nullptr,
      .residual = added.defined() ? added.const_data_ptr() : nullptr,
      .residual_row = added.defined() ? added.stride(0) : 0,
      .output = to.mutable_data_ptr(),
      .output_row = to.stride(0),
  };
  run(packed_conv_kernel(p), p);
}

int64_t Parts::largest() const {
  int64_t most = 0;
  for (int64_t i = 0; i < count(); ++i)
    most = std::max(most, size(i));
  return most;
}

void for_parts(int64_t count, size_t scratch_bytes, c10::function_ref<void(int64_t, std::byte*)> f) {
  parallel(count, scratch_bytes, [&](int64_t begin, int64_t end, std::byte* scratch) {
    const at::AutoDispatchBelowADInplaceOrView below;  // threads do not inherit what the caller excludes from dispatch
    for (int64_t i = begin; i < end; ++i)
      f(i, scratch);
  });
}

NormLayout::Moments multiply(const Parts& parts, size_t scratch_bytes, RowsOf x_of, const at::Tensor& weight,
                             const at::Tensor& y) {
  const NormLayout layout(y.scalar_type(), y.size(0), y.size(1));
  const at::Tensor sums = layout.sums(y.size(0));
  const ProductWeight right(weight.t());
  for_parts(parts.count(), scratch_bytes, [&](int64_t i, std::byte* scratch) {
    const int64_t first = parts.first(i), size = parts.size(i);
    right.multiply(x_of(first, size, scratch), y.narrow(0, first, size));
    run_here(kernels().norm_statistics, {layout.sizes(size), layout.rows(y, first), layout.sums_of(sums, first)});
  });
  return layout.join_moments(sums, y.size(0));
}

at::Tensor weight_gradient(const Parts& parts, size_t scratch_bytes, ProductRowsOf rows_of, const at::Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1);
  // the partial sums take at most half of the memory of input and output
  const int64_t most = std::clamp<int64_t>(parts.rows() * (in + out) / (2 * in * out), 2, most_slabs);
  const int64_t slabs = std::min(parts.most_slabs(), most);
  const at::Tensor sums = at::empty({slabs, out, in}, weight.options().dtype(accumulate_type(weight.scalar_type())));
  for_parts(slabs, scratch_bytes, [&](int64_t slab, std::byte* scratch) {
    at::Tensor sum = sums[slab];
    const int64_t begin = parts.begin(slab, slabs), end = parts.begin(slab + 1, slabs);
    for (int64_t i = begin; i < end; ++i) {
      const auto [grad, x] = rows_of(parts.first(i), parts.size(i), scratch);
      if (!has_kernel(x)) {
        if (sum.scalar_type() != x.scalar_type())
          i == begin ? sum.copy_(at::mm(grad.t(), x)) : sum.add_(at::mm(grad.t(), x));
        else
          i == begin ? at::mm_out(sum, grad.t(), x) : sum.addmm_(grad.t(), x);
        continue;
      }
      run(kernels().weight_gradient, {.rows = x.size(0),
                                      .outputs = out,
                                      .inputs = in,
                                      .grad = {grad.const_data_ptr(), grad.stride(0)},
                                      .input = {x.const_data_ptr(), x.stride(0)},
                                      .sums = sum.mutable_data_ptr<float>(),
                                      .add = i > begin});
    }
  });
  return slabs == 1 ? sums[0] : sums.sum(0);
}

void input_gradient(const at::Tensor& grad, const ProductWeight& weight, int64_t first, const at::Tensor& to,
                    const at::Tensor& added) {
  const int64_t size = grad.size(0);
  weight.multiply(grad, to.narrow(0, first, size), added.defined() ? added.narrow(0, first, size) : added);
}

}  // namespace mobilemamba::cpu
