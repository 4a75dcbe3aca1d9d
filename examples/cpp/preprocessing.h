// From an image to the tensor that a model was trained for, with the figures of mobilemamba.data.Preprocessing.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "image.h"

struct Preprocessing {
  int64_t resize, crop;          // pixels: of the short side, and of the square cut from the centre
  std::string interpolation;     // "bicubic" or "bilinear"
  std::vector<float> mean, std;  // of each channel, of values from 0 to 1

  /// uint8 (channels, crop, crop).
  at::Tensor pixels(const Image& image) const;

  /// float32 (channels, crop, crop), normalised.
  at::Tensor operator()(const Image& image) const;
};
