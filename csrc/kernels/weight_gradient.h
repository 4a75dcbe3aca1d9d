// The gradient of a matrix product's weight: parameters of its kernel.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/norm.h"

namespace mobilemamba {

/// sums = grad.t() @ input, or sums += grad.t() @ input, in float32. The sums (outputs, inputs) are contiguous.
struct WeightGradient {
  int64_t rows, outputs, inputs;
  Rows grad, input;  // (rows, outputs) and (rows, inputs)
  float* sums;
  bool add;
};

}  // namespace mobilemamba
