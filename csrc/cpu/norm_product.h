// Matrix products before a norm, and their gradients, in parts of the rows: each part goes through all of its steps
// before the next one, so that what is between the steps stays in the cache.
#pragma once

#include <c10/util/FunctionRef.h>

#include <algorithm>

#include "cpu/norm.h"

namespace mobilemamba::cpu {

/// Rows of a product of a matrix (rows, in) and a weight (out, in) in parts. They depend on the sizes only, not on the
/// number of threads.
class Parts {
 public:
  /// All parts but the last have a multiple of `multiple` rows.
  Parts(int64_t rows, int64_t in, int64_t out, int64_t multiple);
  /// Whole images, or parts of one image; all but an image's last part have a multiple of NormLayout::most_joined rows.
  static Parts of_images(int64_t images, int64_t rows_of_image, int64_t in, int64_t out);

  int64_t rows() const { return rows_; }
  int64_t count() const { return groups_ * parts_of_group_; }
  int64_t largest() const { return part_; }
  int64_t first(int64_t i) const { return i / parts_of_group_ * group_ + i % parts_of_group_ * part_; }
  int64_t size(int64_t i) const {
    const int64_t group_end = std::min(rows_, (i / parts_of_group_ + 1) * group_);
    return std::max<int64_t>(0, std::min(part_, group_end - first(i)));
  }
  /// Slabs are ranges of parts. No image is in two of them.
  int64_t most_slabs() const { return of_images_ ? groups_ : parts_of_group_; }
  /// The first part of a slab.
  int64_t begin(int64_t slab, int64_t slabs) const;

 private:
  Parts(int64_t rows, int64_t group, int64_t part, bool of_images);
  int64_t rows_, group_, part_, groups_, parts_of_group_;
  bool of_images_;
};

/// Calls f(i, scratch) for i in [0, count) on torch's threads, below autograd.
void for_parts(int64_t count, size_t scratch_bytes, c10::function_ref<void(int64_t, std::byte*)> f);

/// y = x @ weight.t(), and the norm's sums for its moments. `x_of(first, size, scratch)` returns rows of x.
using RowsOf = c10::function_ref<at::Tensor(int64_t first, int64_t size, std::byte* scratch)>;
NormLayout::Moments multiply(const Parts& parts, size_t scratch_bytes, RowsOf x_of, const at::Tensor& weight,
                             const at::Tensor& y);

/// Rows of a product's output gradient and of its input.
struct ProductRows {
  at::Tensor grad, x;
};
using ProductRowsOf = c10::function_ref<ProductRows(int64_t first, int64_t size, std::byte* scratch)>;

/// The gradient of a weight (out, in), in the accumulator type. `rows_of` is called once for each part; the parts of
/// one slab are computed in their order by one thread.
at::Tensor weight_gradient(const Parts& parts, size_t scratch_bytes, ProductRowsOf rows_of, const at::Tensor& weight);

/// Rows [first, first + grad.size(0)) of `to` become grad @ weight, plus these rows of `added` if that is defined.
void input_gradient(const at::Tensor& grad, const at::Tensor& weight, int64_t first, const at::Tensor& to,
                    const at::Tensor& added = {});

/// Calls a kernel for all of its tasks on this thread.
template <typename Params>
void run_here(const Kernel<Params>& kernel, const Params& p) {
  kernel.run(p, 0, kernel.tasks(p), nullptr);
}

}  // namespace mobilemamba::cpu
