// Matrix products before a norm; see the header.
#include "cpu/norm_product.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zero.h>

#include "cpu/team.h"

namespace mobilemamba::cpu {
namespace {

/// Elements of a part's input and output: 768 KiB in float32, which the L3 cache holds for each thread. With fewer,
/// torch's product packs the weight too often.
constexpr int64_t part_elements = 3 << 16;
/// The least number of parts, unless they would be smaller than a block; the most partial sums of a weight's gradient.
constexpr int64_t least_parts = 4, most_slabs = 8;

int64_t round_up(int64_t x, int64_t multiple) {
  return multiple * std::max<int64_t>(1, ceil_div(x, multiple));
}

}  // namespace

Parts::Parts(int64_t rows, int64_t group, int64_t part, bool of_images)
    : rows_(rows),
      group_(group),
      part_(part),
      groups_(ceil_div(rows, group)),
      parts_of_group_(ceil_div(group, part)),
      of_images_(of_images) {}

Parts::Parts(int64_t rows, int64_t in, int64_t out, int64_t multiple)
    : Parts(rows, rows, round_up(std::min(part_elements / (in + out), ceil_div(rows, least_parts)), multiple), false) {}

Parts Parts::of_images(int64_t images, int64_t rows_of_image, int64_t in, int64_t out) {
  const int64_t wanted = round_up(part_elements / (in + out), NormLayout::most_joined);
  const int64_t together = std::clamp<int64_t>(wanted / rows_of_image, 1, ceil_div(images, least_parts));
  const int64_t group = together * rows_of_image;
  return {images * rows_of_image, group, std::min(group, wanted), true};
}

int64_t Parts::begin(int64_t slab, int64_t slabs) const {
  return of_images_ ? groups_ * slab / slabs * parts_of_group_ : parts_of_group_ * slab / slabs;
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
  for_parts(parts.count(), scratch_bytes, [&](int64_t i, std::byte* scratch) {
    const int64_t first = parts.first(i), size = parts.size(i);
    at::Tensor part = y.narrow(0, first, size);
    at::mm_out(part, x_of(first, size, scratch), weight.t());
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
    bool empty = true;
    for (int64_t i = parts.begin(slab, slabs); i < parts.begin(slab + 1, slabs); ++i) {
      if (parts.size(i) == 0) continue;
      const auto [grad, x] = rows_of(parts.first(i), parts.size(i), scratch);
      if (sum.scalar_type() != x.scalar_type())
        empty ? sum.copy_(at::mm(grad.t(), x)) : sum.add_(at::mm(grad.t(), x));
      else if (empty)
        at::mm_out(sum, grad.t(), x);
      else
        sum.addmm_(grad.t(), x);
      empty = false;
    }
    if (empty) sum.zero_();
  });
  return slabs == 1 ? sums[0] : sums.sum(0);
}

void input_gradient(const at::Tensor& grad, const at::Tensor& weight, int64_t first, const at::Tensor& to,
                    const at::Tensor& added) {
  at::Tensor rows = to.narrow(0, first, grad.size(0));
  if (added.defined())
    at::addmm_out(rows, added.narrow(0, first, grad.size(0)), grad, weight);
  else
    at::mm_out(rows, grad, weight);
}

}  // namespace mobilemamba::cpu
