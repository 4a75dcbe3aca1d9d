// The patches of a dense convolution as the rows of a matrix, and their gradients added up in the image.
#pragma once

#include "ops/common.h"

namespace mobilemamba::cpu {

/// Zero padding of kernel / 2. A patch is (kernel, kernel, channels).
class ImagePatches {
 public:
  /// `image` (B, C, H, W) is channels-last contiguous.
  ImagePatches(const at::Tensor& image, int64_t kernel, int64_t stride);

  int64_t elements() const { return kernel_ * kernel_ * channels_; }
  int64_t rows_of_image() const { return out_height_ * out_width_; }
  int64_t images() const { return images_; }

  /// Writes the patches of rows [first, first + size).
  void gather(int64_t first, int64_t size, std::byte* to) const;
  /// Adds the gradients of these patches to `grad_image`, which is like the image. Not for 16-bit elements.
  void scatter(int64_t first, int64_t size, const std::byte* from, const at::Tensor& grad_image) const;
  /// Sets the gradients of the images of rows [first, first + size) to zero, where a row is an image's first one.
  void clear(int64_t first, int64_t size, const at::Tensor& grad_image) const;

 private:
  /// Calls f(line, offset, length): a contiguous part of a patch's line. `line` is its first element in the image,
  /// `offset` in the patches of these rows.
  template <typename F>
  void for_lines(int64_t first, int64_t size, const F& f) const;

  at::Tensor image_;
  int64_t images_, channels_, height_, width_, kernel_, stride_, out_height_, out_width_;
};

}  // namespace mobilemamba::cpu
