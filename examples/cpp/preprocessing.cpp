// Pillow's resampling of 8-bit images: antialiased, first along rows, then along columns, each pass in fixed point and
// rounded to 8 bits; see preprocessing.h.
#include "preprocessing.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace {

constexpr int precision = 22;  // bits of a weight after the point

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double bilinear(double x) {
  return std::max(0.0, 1 - std::abs(x));
}

/// The input pixels that an output pixel is the weighted mean of.
struct Window {
  int64_t first;
  std::vector<int> weights;
};

std::vector<Window> windows(int64_t from, int64_t to, const std::string& interpolation) {
  const auto filter = interpolation == "bicubic" ? bicubic : bilinear;
  const double scale = static_cast<double>(from) / to, stretch = std::max(1.0, scale);
  const double support = (interpolation == "bicubic" ? 2.0 : 1.0) * stretch;
  std::vector<Window> result(to);
  for (int64_t i = 0; i < to; ++i) {
    const double center = (i + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const int64_t last = std::min(from, static_cast<int64_t>(center + support + 0.5));
    std::vector<double> weights(last - first);
    double sum = 0;
    for (int64_t k = first; k < last; ++k)
      sum += weights[k - first] = filter((k - center + 0.5) / stretch);
    result[i].first = first;
    for (const double weight : weights)
      result[i].weights.push_back(static_cast<int>(std::round(weight / sum * (1 << precision))));
  }
  return result;
}

/// One line, whose pixels are this many bytes apart.
void resample(const std::vector<Window>& windows, const uint8_t* from, int64_t from_step, uint8_t* to,
              int64_t to_step) {
  for (const Window& window : windows) {
    int64_t sum = 1 << (precision - 1);
    const uint8_t* pixel = from + window.first * from_step;
    for (const int weight : window.weights) {
      sum += *pixel * static_cast<int64_t>(weight);
      pixel += from_step;
    }
    *to = static_cast<uint8_t>(std::clamp<int64_t>(sum >> precision, 0, 255));
    to += to_step;
  }
}

Image resized(const Image& image, int64_t width, int64_t height, const std::string& interpolation) {
  const int64_t channels = image.channels;
  Image rows(width, image.height, channels), result(width, height, channels);
  const auto across = windows(image.width, width, interpolation), down = windows(image.height, height, interpolation);
  for (int64_t y = 0; y < image.height; ++y)
    for (int64_t c = 0; c < channels; ++c)
      resample(across, image.at(0, y) + c, channels, rows.at(0, y) + c, channels);
  for (int64_t i = 0; i < width * channels; ++i)
    resample(down, rows.pixels.data() + i, width * channels, result.pixels.data() + i, width * channels);
  return result;
}

/// The centre, its corner rounded as Python rounds: a half to the even number.
Image centre(const Image& image, int64_t width, int64_t height) {
  const int64_t left = std::lrint((image.width - width) / 2.0), top = std::lrint((image.height - height) / 2.0);
  Image result(width, height, image.channels);
  for (int64_t y = 0; y < height; ++y)
    std::copy_n(image.at(left, top + y), width * image.channels, result.at(0, y));
  return result;
}

Image with_channels(const Image& image, int64_t channels) {
  if (image.channels == channels) return image;
  Image result(image.width, image.height, channels);
  for (size_t i = 0; i < result.pixels.size() / channels; ++i) {
    if (channels == 3) {
      std::fill_n(&result.pixels[3 * i], 3, image.pixels[i]);
    } else {
      const uint8_t* rgb = &image.pixels[3 * i];  // the luma of ITU-R 601, in Pillow's fixed point
      result.pixels[i] = (rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) >> 16;
    }
  }
  return result;
}

}  // namespace

at::Tensor Preprocessing::pixels(const Image& source) const {
  const int64_t channels = static_cast<int64_t>(mean.size());
  if (channels != 1 && channels != 3)
    throw std::runtime_error("image files are read into 1 (grey) or 3 (RGB) channels; the model takes " +
                             std::to_string(channels));
  Image image = with_channels(source, channels);
  int64_t shorter = std::min(image.width, image.height);
  if (shorter < 1) throw std::runtime_error("expected at least one pixel");
  image = centre(image, std::min(image.width, 16 * shorter), std::min(image.height, 16 * shorter));
  image = resized(image, resize * image.width / shorter, resize * image.height / shorter, interpolation);
  image = centre(image, crop, crop);
  return at::from_blob(image.pixels.data(), {crop, crop, channels}, at::kByte).permute({2, 0, 1}).clone();
}

at::Tensor Preprocessing::operator()(const Image& image) const {
  const auto channel = [](const std::vector<float>& values) { return at::tensor(values).view({-1, 1, 1}); };
  return pixels(image).to(at::kFloat) * (1 / (255 * channel(std))) - channel(mean) / channel(std);
}
