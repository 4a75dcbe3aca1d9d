// The bidirectional selective scan: parameters of its kernels, and the arithmetic of one position.
//
// Sizes: batch B, channels D, length L, rank R of the step size, state size N. Direction k = 0 runs t = 0 .. L-1,
// k = 1 runs t = L-1 .. 0. Host and device compile this file; V is a scalar or a vector of channels.
#pragma once

#include <cstdint>

#include "kernels/common.h"
#include "kernels/functions.h"

namespace mobilemamba {

/// A coefficient that varies along the sequence, (B, 2, rows, L) with strides in elements, in the element type.
struct ScanRows {
  const void* data;
  int64_t batch, direction, row, position;
};

struct ScanForward {
  DType dtype;
  int64_t batch, channels, length, rank, state;
  const void* u;  // (B, L, D): strides u_batch and u_position, channels contiguous
  int64_t u_batch, u_position;
  ScanRows delta, B, C;   // rows: R, N, N
  const void* A_log;      // (2, N, D), in the accumulator type like the next three
  const void* D;          // (2, D)
  const void* dt_weight;  // (2, R, D)
  const void* dt_bias;    // (2, D)
  void* y;                // (B, L, D) contiguous
  void* scratch;          // as many bytes as the backend asks for

  MOBILEMAMBA_HOST_DEVICE int64_t rows() const { return rank + 2 * state; }
};

/// grad_rows and grad_params are partial sums, in the accumulator type: the caller adds their slices in order. So the
/// result depends neither on the number of threads nor on their timing.
struct ScanBackward : ScanForward {
  const void* grad_y;  // (B, L, D): strides grad_y_batch and grad_y_position, channels contiguous
  int64_t grad_y_batch, grad_y_position;
  void* grad_u;            // (B, L, D) contiguous
  int64_t group_channels;  // channels that share a slice of grad_rows
  int64_t segments;        // parts of the sequence, each with a slice of grad_params
  void* grad_rows;         // (B, groups, 2, R + 2N, L): gradients of delta, B and C
  void* grad_params;       // (B, segments, 2, N + R + 2, D): gradients of A_log, dt_weight, dt_bias and D

  MOBILEMAMBA_HOST_DEVICE int64_t groups() const { return ceil_div(channels, group_channels); }
};

/// h_t from h_(t-1). `dt_u` is dt * u; b is B at this position.
template <typename V, typename S>
MOBILEMAMBA_HOST_DEVICE V scan_step(V h, V decay, V dt_u, S b) {
  return decay * h + dt_u * b;
}

/// Gradients of u and dt at one position, summed over the states.
template <typename V>
struct ScanStepGradient {
  V u, dt;
};

/// The backward step of one state at one position. `carry` is dL/dh_t from the later positions, and becomes
/// dL/dh_(t-1). Adds to `grad` and `grad_A`. `grad_B` and `grad_C` are this channel's part of the gradients of B and C.
template <typename V, typename S>
MOBILEMAMBA_HOST_DEVICE void scan_step_backward(V& carry, ScanStepGradient<V>& grad, V& grad_A, V grad_y, V h_before,
                                                V decay, V dt, V u, V A, S b, S c, V& grad_B, V& grad_C) {
  const V dt_u = dt * u;
  const V grad_h = grad_y * c + carry;
  const V grad_dt_A = grad_h * h_before * decay;
  carry = grad_h * decay;
  grad.dt = grad.dt + grad_dt_A * A + grad_h * u * b;
  grad.u = grad.u + grad_h * dt * b;
  grad_A = grad_A + grad_dt_A * dt;
  grad_B = grad_h * dt_u;
  grad_C = grad_y * scan_step(h_before, decay, dt_u, b);
}

}  // namespace mobilemamba
