// Host side of the bidirectional scan that its backends share: checks, outputs, kernel parameters.
#pragma once

#include "kernels/scan.h"
#include "mobilemamba.h"

namespace mobilemamba {

/// The operator's arguments, in the order of its schema.
struct ScanArguments {
  const at::Tensor &u, &delta, &A_log, &B, &C, &D, &dt_weight, &dt_bias;

  void check() const;
  void check_backward(const at::Tensor& grad_y) const;
};

/// An uninitialised y for u, or grad_u: (B, D, L), channels-last in memory.
at::Tensor scan_output(const at::Tensor& u);

/// Uninitialised gradients, for the Meta backend.
ScanGradients scan_gradients(const ScanArguments& a);

/// Kernel parameters, and the tensors that they point into.
class ScanInputs {
 public:
  explicit ScanInputs(const ScanArguments& a);
  ScanForward forward(at::Tensor& y) const;

 protected:
  ScanForward inputs() const;
  at::Tensor u_, delta_, B_, C_, A_log_, D_, dt_weight_, dt_bias_;
};

class ScanBackwardInputs : public ScanInputs {
 public:
  ScanBackwardInputs(const at::Tensor& grad_y, const ScanArguments& a);
  /// Allocates the outputs and partial sums.
  ScanBackward backward();
  /// Adds up the partial sums after the kernel has run.
  ScanGradients gradients(const ScanArguments& a) const;

 private:
  at::Tensor grad_y_, grad_u_, grad_rows_, grad_params_;
};

}  // namespace mobilemamba
