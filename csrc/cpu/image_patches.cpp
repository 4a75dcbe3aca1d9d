// The patches of a dense convolution; see the header.
#include "cpu/image_patches.h"

#include <algorithm>
#include <cstring>

namespace mobilemamba::cpu {

ImagePatches::ImagePatches(const at::Tensor& image, int64_t kernel, int64_t stride)
    : image_(image),
      images_(image.size(0)),
      channels_(image.size(1)),
      height_(image.size(2)),
      width_(image.size(3)),
      kernel_(kernel),
      stride_(stride),
      out_height_(ceil_div(height_, stride)),
      out_width_(ceil_div(width_, stride)) {}

template <typename F>
void ImagePatches::for_lines(int64_t first, int64_t size, const F& f) const {
  int64_t batch = first / rows_of_image(), y = first / out_width_ % out_height_, x = first % out_width_;
  for (int64_t row = 0; row < size; ++row) {
    const int64_t top = y * stride_ - kernel_ / 2, left = x * stride_ - kernel_ / 2;
    const int64_t begin = std::max<int64_t>(0, -left), end = std::min(kernel_, width_ - left);
    for (int64_t ky = std::max<int64_t>(0, -top); ky < std::min(kernel_, height_ - top); ++ky)
      f(((batch * height_ + top + ky) * width_ + left + begin) * channels_,
        ((row * kernel_ + ky) * kernel_ + begin) * channels_, (end - begin) * channels_);
    if (++x == out_width_) {
      x = 0;
      if (++y == out_height_) {
        y = 0;
        ++batch;
      }
    }
  }
}

void ImagePatches::gather(int64_t first, int64_t size, std::byte* to) const {
  const int64_t bytes = image_.element_size();
  const auto* image = static_cast<const std::byte*>(image_.const_data_ptr());
  std::memset(to, 0, size * elements() * bytes);  // the padding
  for_lines(first, size, [&](int64_t line, int64_t offset, int64_t length) {
    std::memcpy(to + offset * bytes, image + line * bytes, length * bytes);
  });
}

void ImagePatches::scatter(int64_t first, int64_t size, const std::byte* from, const at::Tensor& grad_image) const {
  const auto add = [&](auto* image, const auto* patches) {
    for_lines(first, size, [&](int64_t line, int64_t offset, int64_t length) {
      for (int64_t i = 0; i < length; ++i)
        image[line + i] += patches[offset + i];
    });
  };
  if (grad_image.scalar_type() == at::kDouble)
    add(grad_image.mutable_data_ptr<double>(), reinterpret_cast<const double*>(from));
  else
    add(grad_image.mutable_data_ptr<float>(), reinterpret_cast<const float*>(from));
}

void ImagePatches::clear(int64_t first, int64_t size, const at::Tensor& grad_image) const {
  const int64_t bytes = height_ * width_ * channels_ * grad_image.element_size();
  for (int64_t batch = ceil_div(first, rows_of_image()); batch * rows_of_image() < first + size; ++batch)
    std::memset(static_cast<std::byte*>(grad_image.mutable_data_ptr()) + batch * bytes, 0, bytes);
}

}  // namespace mobilemamba::cpu
