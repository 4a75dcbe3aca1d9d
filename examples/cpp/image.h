// Images from JPEG and PNG files, the same bytes that Pillow reads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

/// Rows of pixels with interleaved channels: 1 (grey) or 3 (RGB) of 8 bits.
struct Image {
  int64_t width = 0, height = 0, channels = 0;
  std::vector<uint8_t> pixels;

  Image() = default;
  Image(int64_t width, int64_t height, int64_t channels)
      : width(width), height(height), channels(channels), pixels(width * height * channels) {}
  uint8_t* at(int64_t x, int64_t y) { return &pixels[(y * width + x) * channels]; }
  const uint8_t* at(int64_t x, int64_t y) const { return &pixels[(y * width + x) * channels]; }
};

/// Reads a JPEG or PNG file, turned upright as its EXIF orientation says. Palettes become RGB, transparency is dropped,
/// of 16 bits the upper 8 are kept. Throws std::runtime_error, with the path, where the file is no such image.
Image read_image(const std::string& path);
