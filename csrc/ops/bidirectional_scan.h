// The host side of the bidirectional scan, shared by its backends: checks, outputs, kernel parameters.
#pragma once

#include "kernels/scan.h"
#include "mobilemamba.h"

namespace mobilemamba {

/// The operator's arguments, in the order of its schema.
struct ScanArguments {
  at::Tensor u, delta, A_log, B, C, D, dt_weight, dt_bias;

  void check() const;
  void check_backward(const at::Tensor& grad_y) const;
};

/// An uninitialised y for u, or grad_u: (B, D, L), channels-last in memory.
at::Tensor scan_output(const at::Tensor& u);

/// Uninitialised gradients, for the Meta backend.
ScanGradients scan_gradients(const ScanArguments& a);

/// The operators on a backend's kernels.
struct ScanBackend {
  size_t (*forward_scratch_bytes)(const ScanForward&);
  void (*forward)(const ScanForward&);
  void (*divide_backward)(ScanBackward&);  // sets group_channels and segments
  size_t (*backward_scratch_bytes)(const ScanBackward&);
  void (*backward)(const ScanBackward&);

  at::Tensor bidirectional_scan(const ScanArguments& a) const;
  ScanGradients bidirectional_scan_backward(const at::Tensor& grad_y, const ScanArguments& a) const;
};

}  // namespace mobilemamba
