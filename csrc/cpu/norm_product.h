// Matrix products before a norm, and their gradients, in parts of the rows: each part goes through all of its steps
// before the next one, so that what is between the steps stays in the cache.
#pragma once

#include <c10/util/FunctionRef.h>

#include <utility>
#include <vector>

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

  int64_t rows() const { return bounds_.back(); }
  int64_t count() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  int64_t first(int64_t i) const { return bounds_[i]; }
  int64_t size(int64_t i) const { return bounds_[i + 1] - bounds_[i]; }
  int64_t largest() const;

  /// Slabs are ranges of parts. No image is in two of them.
  int64_t most_slabs() const { return count() / of_image_; }
  /// The first part of a slab.
  int64_t begin(int64_t slab, int64_t slabs) const { return most_slabs() * slab / slabs * of_image_; }

 private:
  Parts(std::vector<int64_t> bounds, int64_t of_image) : bounds_(std::move(bounds)), of_image_(of_image) {}
  std::vector<int64_t> bounds_;  // the first row of each part, then the number of rows
  int64_t of_image_ = 1;         // parts that must be in one slab
};

/// A weight as the right side of a matrix product, prepared for several calls. Kernels compute it in float32, torch in
/// other types.
class ProductWeight {
 public:
  /// For products with `right`, (in, out), of any strides.
  explicit ProductWeight(const at::Tensor& right);

  /// to = x @ right, plus `added` if that is defined. Rows may have any distance, and their columns are contiguous.
  void multiply(const at::Tensor& x, const at::Tensor& to, const at::Tensor& added = {}) const;

 private:
  at::Tensor right_, packed_;
};

/// Calls f(i, scratch) for i in [0, count) on torch's threads, below autograd.
void for_parts(int64_t count, size_t scratch_bytes, c10::function_ref<void(int64_t, std::byte*)> f);

/// y = x @ weight.t() for a weight (out, in), and the norm's sums for its moments. `x_of(first, size, scratch)` returns
/// rows of x.
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
void input_gradient(const at::Tensor& grad, const ProductWeight& weight, int64_t first, const at::Tensor& to,
                    const at::Tensor& added = {});

/// Calls a kernel for all of its tasks on this thread.
template <typename Params>
void run_here(const Kernel<Params>& kernel, const Params& p) {
  kernel.run(p, 0, kernel.tasks(p), nullptr);
}

}  // namespace mobilemamba::cpu
