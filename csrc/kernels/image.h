// A batch of images as the kernels see it.
#pragma once

#include <cstdint>

namespace mobilemamba {

/// (B, H, W, C), channels contiguous. Strides are in elements.
struct Image {
  const void* data;
  int64_t batch, row, column;
};

}  // namespace mobilemamba
