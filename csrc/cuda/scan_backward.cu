// The bidirectional scan, backward; see scan.cuh for the scheme. The kernel recomputes the states. It scans the
// gradient of the state by the same scheme, in the opposite order. A warp sums over its channels, a block over its
// positions. The caller adds these partial sums, so that the order in which blocks run changes no result.
#include "cuda/scan.cuh"

namespace mobilemamba::cuda {
namespace {

template <typename T>
constexpr ScanShape shape = scan_backward_shape(sizeof(T) == 8);

/// Sums the gradients of one channel's parameters over the block's positions, `parameter_batch` parameters at a time.
template <typename Acc>
class ParameterSums {
 public:
  /// `out`: where the first parameter's sum of this lane's channel goes; null in lanes past the last channel.
  __device__ ParameterSums(Acc* shared, int warps, Acc* out, int64_t channels)
      : shared_(shared), warps_(warps), out_(out), channels_(channels) {}

  /// Adds this thread's part of the next parameter's gradient; every thread of the block calls it.
  __device__ void add(Acc value) {
    shared_[(count_ * warps_ + threadIdx.y) * warp_size + threadIdx.x] = value;
    if (++count_ == parameter_batch) flush();
  }

  __device__ void flush() {
    __syncthreads();
    for (int i = threadIdx.y; i < count_; i += warps_) {
      Acc sum = Acc(0);
      for (int w = 0; w < warps_; ++w)
        sum += shared_[(i * warps_ + w) * warp_size + threadIdx.x];
      if (out_) out_[i * channels_] = sum;
    }
    __syncthreads();
    if (out_) out_ += count_ * channels_;
    count_ = 0;
  }

 private:
  Acc* const shared_;  // (parameter_batch, warps, 32)
  const int warps_;
  Acc* out_;
  const int64_t channels_;
  int count_ = 0;
};

/// A thread's own elements, one for each position, in shared memory: this lowers the register pressure.
template <typename Acc>
struct Kept {
  Acc* lane;
  __device__ Acc& operator[](int t) const { return lane[t * warp_size]; }
};

/// The gradients of one direction. `decay` and `before` are in the direction's order: index i belongs to the position
/// t = visited(direction, i).
template <int direction, bool one_state, typename T, int chunk_length, typename Acc>
__device__ __forceinline__ void run_direction(const ScanBackward& p, const ScanLaunch& launch, Pass pass,
                                              const Chunk<T, chunk_length>& chunk, Acc* shared, Kept<Acc> u,
                                              Kept<Acc> grad_y, Acc (&grad_u)[chunk_length]) {
  const int lane = threadIdx.x, warp = threadIdx.y, warps = launch.warps;
  Acc* const handed = shared;  // (warps, 3 values, 32)
  const auto at = [&](int w, int value) -> Acc& { return handed[(w * 3 + value) * warp_size + lane]; };
  const int64_t states = one_state ? 1 : p.state;
  const int64_t part = chunk.batch * launch.segments + chunk.segment;
  Acc* const grad_rows = static_cast<Acc*>(p.grad_rows) +
                         ((chunk.batch * launch.tiles + chunk.tile) * 2 + direction) * p.rows() * p.length +
                         chunk.begin;
  Acc* const grad_params =
      static_cast<Acc*>(p.grad_params) + (part * 2 + direction) * (p.state + p.rank + 2) * p.channels + chunk.channel;
  ParameterSums<Acc> parameter_sums(shared + warps * 3 * warp_size, warps, chunk.active ? grad_params : nullptr,
                                    p.channels);

  Acc dt[chunk_length], grad_dt[chunk_length];
  chunk.step_sizes(direction, dt);
#pragma unroll
  for (int t = 0; t < chunk_length; ++t)
    grad_dt[t] = Acc(0);

  for (int64_t n = 0; n < states; ++n) {
    const Acc A = -exp(chunk.parameter(p.A_log, direction, n, states));
    const auto [b, c] = chunk.B_and_C(direction, n);
    Acc decay[chunk_length], all_decay = Acc(1), state = Acc(0), grad_state = Acc(0);
#pragma unroll
    for (int i = 0; i < chunk_length; ++i) {
      const int t = chunk.visited(direction, i);
      decay[i] = chunk.decay(t, dt[t], rate_of<T>(A));
      state = scan_step(state, decay[i], dt[t] * u[t], b[t]);
      all_decay *= decay[i];
    }
#pragma unroll
    for (int i = chunk_length - 1; i >= 0; --i) {
      const int t = chunk.visited(direction, i);
      grad_state = (grad_y[t] * c[t] + grad_state) * decay[i];
    }
    __syncthreads();  // all warps have read the previous state's values
    at(warp, 0) = all_decay;
    at(warp, 1) = state;
    at(warp, 2) = grad_state;
    __syncthreads();
    if (pass == Pass::collect) {
      if (warp < 2 && chunk.active) {  // warp 0: states; warp 1: their gradients
        const bool ascending = (direction == 0) == (warp == 0);
        Acc carry = Acc(0), block_decay = Acc(1);
        for (int i = 0; i < warps; ++i) {
          const int w = ascending ? i : warps - 1 - i;
          carry = at(w, 0) * carry + at(w, 1 + warp);
          block_decay *= at(w, 0);
        }
        Acc* to = handed_on<Acc>(p, launch, 3, chunk.batch, chunk.segment, direction, n) + chunk.channel;
        if (warp == 0) to[0] = block_decay;
        to[(1 + warp) * p.channels] = carry;
      }
      continue;
    }

    state = grad_state = Acc(0);
    if (pass == Pass::finish) {
      const Acc* from = handed_on<Acc>(p, launch, 3, chunk.batch, chunk.segment, direction, n) + chunk.channel;
      state = from[p.channels];
      grad_state = from[2 * p.channels];
    }
    constexpr int ascending = direction == 0 ? 1 : 2, descending = 3 - ascending;
    Acc& from_below = direction == 0 ? state : grad_state;
    Acc& from_above = direction == 0 ? grad_state : state;
    for (int w = 0; w < warp; ++w)
      from_below = at(w, 0) * from_below + at(w, ascending);
    for (int w = warps - 1; w > warp; --w)
      from_above = at(w, 0) * from_above + at(w, descending);

    Acc before[chunk_length];
#pragma unroll
    for (int i = 0; i < chunk_length; ++i) {
      const int t = chunk.visited(direction, i);
      before[i] = state;
      state = scan_step(state, decay[i], dt[t] * u[t], b[t]);
    }
    Acc grad_A = Acc(0), grad_B_and_C[2 * chunk_length];
#pragma unroll
    for (int i = chunk_length - 1; i >= 0; --i) {
      const int t = chunk.visited(direction, i);
      ScanStepGradient<Acc> grad = {grad_u[t], grad_dt[t]};
      Acc grad_B, grad_C;
      scan_step_backward(grad_state, grad, grad_A, grad_y[t], before[i], decay[i], dt[t], u[t], A, b[t], c[t], grad_B,
                         grad_C);
      grad_u[t] = grad.u;
      grad_dt[t] = grad.dt;
      grad_B_and_C[t] = chunk.active ? grad_B : Acc(0);
      grad_B_and_C[chunk_length + t] = chunk.active ? grad_C : Acc(0);
    }
    const Acc sum = warp_sums<2 * chunk_length>(grad_B_and_C);
    constexpr int lanes = warp_size / (2 * chunk_length);  // with the same sum
    const int which = lane / lanes, t = which % chunk_length;
    if (lane % lanes == 0 && t < chunk.length)
      grad_rows[(p.rank + (which < chunk_length ? 0 : p.state) + n) * p.length + t] = sum;
    parameter_sums.add(grad_A * A);  // A = -exp(A_log)
  }
  if (pass == Pass::collect) return;

#pragma unroll
  for (int t = 0; t < chunk_length; ++t)  // through softplus: from here on the gradient of what went into it
    grad_dt[t] = chunk.active && t < chunk.length ? grad_dt[t] * step_size_derivative_of<T>(dt[t]) : Acc(0);
  chunk.for_each_delta_row(direction, [&](int64_t row, const auto& values) {
    const Acc weight = chunk.active ? chunk.parameter(p.dt_weight, direction, row, p.rank) : Acc(0);
    Acc grad_weight = Acc(0), grad_row[chunk_length];
#pragma unroll
    for (int t = 0; t < chunk_length; ++t) {
      grad_weight += grad_dt[t] * values[t];
      grad_row[t] = grad_dt[t] * weight;
    }
    const Acc sum = warp_sums<chunk_length>(grad_row);
    constexpr int lanes = warp_size / chunk_length;  // with the same sum
    if (lane % lanes == 0 && lane / lanes < chunk.length) grad_rows[row * p.length + lane / lanes] = sum;
    parameter_sums.add(grad_weight);
  });
  Acc grad_bias = Acc(0), grad_D = Acc(0);
#pragma unroll
  for (int t = 0; t < chunk_length; ++t) {
    grad_bias += grad_dt[t];
    grad_D += u[t] * grad_y[t];
  }
  parameter_sums.add(grad_bias);
  parameter_sums.add(grad_D);
  parameter_sums.flush();
}

template <typename T, bool one_state>
__global__ void __launch_bounds__(warp_size* shape<T>.max_warps)
    scan_backward_kernel(const __grid_constant__ ScanBackward p, const __grid_constant__ ScanLaunch launch, Pass pass) {
  using Acc = typename AccumulateOf<T>::type;
  constexpr int chunk_length = shape<T>.chunk_length;
  Acc* const shared = reinterpret_cast<Acc*>(shared_memory);
  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const Chunk<T, chunk_length> chunk(p, launch, task, shared + threadIdx.y * launch.staged);
    Acc* const rest = shared + launch.warps * launch.staged;
    Acc* const kept = rest + threadIdx.y * 2 * chunk_length * warp_size + threadIdx.x;
    const Kept<Acc> u = {kept}, grad_y = {kept + chunk_length * warp_size};
    const Acc skip = chunk.parameter(p.D, 0, 0, 1) + chunk.parameter(p.D, 1, 0, 1);
    Acc grad_u[chunk_length];
    chunk.load(p.u, p.u_batch, p.u_position, grad_u);
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      u[t] = grad_u[t];
    chunk.load(p.grad_y, p.grad_y_batch, p.grad_y_position, grad_u);
    chunk.stage_together();
#pragma unroll
    for (int t = 0; t < chunk_length; ++t) {
      grad_y[t] = grad_u[t];
      grad_u[t] *= skip;
    }
    Acc* const exchanged = rest + launch.warps * 2 * chunk_length * warp_size;
    run_direction<0, one_state>(p, launch, pass, chunk, exchanged, u, grad_y, grad_u);
    run_direction<1, one_state>(p, launch, pass, chunk, exchanged, u, grad_y, grad_u);
    if (pass != Pass::collect) chunk.store(p.grad_u, grad_u);
  }
}

}  // namespace

void scan_divide_backward(ScanBackward& p) {
  p.group_channels = warp_size;
  p.segments = scan_backward_launch(p).segments;
}

size_t scan_backward_scratch_bytes(const ScanBackward& p) {
  return scan_scratch_bytes(p, scan_backward_launch(p), 3);
}

cudaError_t scan_backward(const ScanBackward& p, cudaStream_t stream) {
  return for_type(p.dtype, [&]<typename T>() {
    const auto kernel = p.state == 1 ? scan_backward_kernel<T, true> : scan_backward_kernel<T, false>;
    return launch_scan<typename AccumulateOf<T>::type>(kernel, p, scan_backward_launch(p), 3, stream);
  });
}

}  // namespace mobilemamba::cuda
