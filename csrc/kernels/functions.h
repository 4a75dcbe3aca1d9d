// Functions of the operators' formulas; V is a scalar or a vector of channels.
#pragma once

#include "kernels/common.h"
#include "kernels/scalar.h"

namespace mobilemamba {

/// log(1 + exp(x)) without overflow; exact to rounding for large and small x.
template <typename V>
MOBILEMAMBA_HOST_DEVICE V softplus(V x) {
  return max(x, V(0)) + log1p(exp_nonpositive(-abs(x)));
}

/// d softplus / dx.
template <typename V>
MOBILEMAMBA_HOST_DEVICE V sigmoid(V x) {
  const V e = exp_nonpositive(-abs(x));
  return select(x < V(0), e, V(1)) / (V(1) + e);
}

}  // namespace mobilemamba
