// The functions that the shared arithmetic calls, for scalars. cpu/vec.h has them for vectors.
#pragma once

#include <math.h>

#include "kernels/common.h"

namespace mobilemamba {

MOBILEMAMBA_HOST_DEVICE float exp(float x) {
  return ::expf(x);
}
MOBILEMAMBA_HOST_DEVICE double exp(double x) {
  return ::exp(x);
}
template <typename T>
MOBILEMAMBA_HOST_DEVICE T exp_nonpositive(T x) {  // the version for vectors is faster than their exp
  return exp(x);
}
MOBILEMAMBA_HOST_DEVICE float log1p(float x) {
  return ::log1pf(x);
}
MOBILEMAMBA_HOST_DEVICE double log1p(double x) {
  return ::log1p(x);
}
MOBILEMAMBA_HOST_DEVICE float expm1(float x) {
  return ::expm1f(x);
}
MOBILEMAMBA_HOST_DEVICE double expm1(double x) {
  return ::expm1(x);
}
MOBILEMAMBA_HOST_DEVICE float abs(float x) {
  return ::fabsf(x);
}
MOBILEMAMBA_HOST_DEVICE double abs(double x) {
  return ::fabs(x);
}

MOBILEMAMBA_HOST_DEVICE float sqrt(float x) {
  return ::sqrtf(x);
}
MOBILEMAMBA_HOST_DEVICE double sqrt(double x) {
  return ::sqrt(x);
}

/// The greater of the two; `a` if either is NaN.
template <typename T>
MOBILEMAMBA_HOST_DEVICE T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
MOBILEMAMBA_HOST_DEVICE T select(bool condition, T a, T b) {
  return condition ? a : b;
}

}  // namespace mobilemamba
