// The bidirectional scan on CUDA: the parts that its forward and backward kernels share.
//
// A thread holds a chunk of successive positions of one channel in registers, so that u is read once. It scans the
// chunk in both directions from a state of zero. Two values then describe the chunk to the next one: its decay (the
// product over its positions) and its last state. From them each thread computes its carry, the state before its first
// position, and corrects its outputs. The chunks of a block exchange the two values in shared memory, the segments of a
// long sequence in global memory.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"

namespace mobilemamba::cuda {

/// A sequence of several segments takes three launches: `collect`, then scan_carry_kernel, then `finish`.
enum class Pass { whole, collect, finish };

// For 16-bit elements the errors of the fast functions stay below the elements' rounding error, except for small step
// sizes: there a short series replaces the functions.

template <typename T, typename Acc>
__device__ __forceinline__ Acc decay_of(Acc dt_A) {
  if constexpr (sizeof(T) == 2)
    return __expf(dt_A);
  else
    return exp(dt_A);
}

template <typename T, typename Acc>
__device__ __forceinline__ Acc step_size_of(Acc x) {
  if constexpr (sizeof(T) == 2) {
    const float e = __expf(-fabsf(x));
    return fmaxf(x, 0.0f) + (e < 0.01f ? e * (1.0f - e * (0.5f - e * (1.0f / 3.0f))) : __logf(1.0f + e));
  } else {
    return softplus(x);
  }
}

/// sigmoid(x) for the x whose softplus is `dt`.
template <typename T, typename Acc>
__device__ __forceinline__ Acc step_size_derivative_of(Acc dt) {
  if constexpr (sizeof(T) == 2)
    return dt < 0.01f ? dt * (1.0f - dt * (0.5f - dt * (1.0f / 6.0f))) : 1.0f - __expf(-dt);
  else
    return -expm1(-dt);
}

/// The scratch entry of a segment and direction for state `n`, (values, D): decay, state, and backward the gradient.
template <typename Acc>
__device__ __forceinline__ Acc* handed_on(const ScanForward& p, const ScanLaunch& launch, int values, int64_t batch,
                                          int64_t segment, int64_t direction, int64_t n) {
  return static_cast<Acc*>(p.scratch) +
         (((batch * launch.segments + segment) * 2 + direction) * p.state + n) * values * p.channels;
}

/// A warp's share of the work: its positions, the channel of this lane, and its shared memory.
template <typename T, int chunk_length>
struct Chunk {
  using Acc = typename AccumulateOf<T>::type;

  const ScanForward& p;
  Acc* const staged;  // (staged_rows, chunk_length)
  const int lane;
  int64_t batch, segment, tile, begin, channel;
  int length;   // in positions: less than chunk_length at the end of the sequence
  bool active;  // false in lanes past the last channel

  __device__ Chunk(const ScanForward& p, const ScanLaunch& launch, int64_t task, Acc* staged)
      : p(p), staged(staged), lane(threadIdx.x) {
    tile = task % launch.tiles;
    segment = task / launch.tiles % launch.segments;
    batch = task / launch.tiles / launch.segments;
    begin = (segment * launch.warps + threadIdx.y) * chunk_length;
    length = static_cast<int>(p.length - begin < 0              ? 0
                              : p.length - begin < chunk_length ? p.length - begin
                                                                : chunk_length);
    channel = tile * warp_size + lane;
    active = channel < p.channels;
    if (!active) channel = p.channels - 1;  // a channel that can be read; the result is discarded
  }

  /// Reads this channel's elements of a (B, L, D) tensor; zero past the end of the sequence.
  __device__ void load(const void* data, int64_t batch_stride, int64_t position_stride, Acc (&x)[chunk_length]) const {
    const T* from = static_cast<const T*>(data) + batch * batch_stride + begin * position_stride + channel;
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      x[t] = active && t < length ? widen(from[t * position_stride]) : Acc(0);
  }

  /// Writes this channel's elements of a contiguous (B, L, D) tensor.
  __device__ void store(void* data, const Acc (&x)[chunk_length]) const {
    T* to = static_cast<T*>(data) + (batch * p.length + begin) * p.channels + channel;
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      if (active && t < length) to[t * p.channels] = narrow<T>(x[t]);
  }

  /// This channel's element of a parameter (2, rows, D).
  __device__ Acc parameter(const void* data, int64_t direction, int64_t row, int64_t rows) const {
    return static_cast<const Acc*>(data)[(direction * rows + row) * p.channels + channel];
  }

  /// Copies `count` rows of the chunk's positions to row `to` of shared memory and after; zero past the sequence's end.
  __device__ void stage(const ScanRows& rows, int64_t direction, int64_t first, int count, int to) const {
    const T* from = static_cast<const T*>(rows.data) + batch * rows.batch + direction * rows.direction +
                    first * rows.row + begin * rows.position;
    for (int i = lane; i < count * chunk_length; i += warp_size) {
      const int t = i % chunk_length, row = i / chunk_length;
      staged[to * chunk_length + i] = t < length ? widen(from[row * rows.row + t * rows.position]) : Acc(0);
    }
  }

  /// Calls f(row, values) for each row of delta; `values` are the chunk's elements of the row, in shared memory.
  template <typename F>
  __device__ void for_each_delta_row(int64_t direction, F f) const {
    for (int64_t first = 0; first < p.rank; first += staged_rows) {
      const int count = static_cast<int>(p.rank - first < staged_rows ? p.rank - first : staged_rows);
      __syncwarp();  // all lanes have read the previous rows
      stage(p.delta, direction, first, count, 0);
      __syncwarp();
      for (int row = 0; row < count; ++row)
        f(first + row, staged + row * chunk_length);
    }
  }

  /// The step size of each position. It is zero past the end of the sequence, so that the state stays as it is.
  __device__ void step_sizes(int64_t direction, Acc (&dt)[chunk_length]) const {
    const Acc bias = parameter(p.dt_bias, direction, 0, 1);
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      dt[t] = bias;
    for_each_delta_row(direction, [&](int64_t row, const Acc* values) {
      const Acc weight = parameter(p.dt_weight, direction, row, p.rank);
#pragma unroll
      for (int t = 0; t < chunk_length; ++t)
        dt[t] += weight * values[t];
    });
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      dt[t] = t < length ? step_size_of<T>(dt[t]) : Acc(0);
  }

  /// Copies B and C of state `n` to rows 0 and 1 of shared memory.
  __device__ void stage_B_and_C(int64_t direction, int64_t n) const {
    __syncwarp();
    stage(p.B, direction, n, 1, 0);
    stage(p.C, direction, n, 1, 1);
    __syncwarp();
  }

  __device__ Acc b(int t) const { return staged[t]; }
  __device__ Acc c(int t) const { return staged[chunk_length + t]; }

  /// The state's decay at a position; 1 past the end of the sequence, for an infinite A too.
  __device__ Acc decay(int t, Acc dt, Acc A) const { return t < length ? decay_of<T>(dt * A) : Acc(1); }

  /// The i-th position in the order of the direction.
  __device__ static constexpr int visited(int direction, int i) { return direction == 0 ? i : chunk_length - 1 - i; }
};

/// The number of carries between two segments: states, and backward also their gradients.
__host__ __device__ inline int64_t carries(const ScanForward& p, int values) {
  return (values - 1) * p.batch * 2 * p.state * p.channels;
}

/// Scans over the segments: replaces each segment's last state by the carry into the segment. A thread takes one carry.
template <typename Acc>
__global__ void __launch_bounds__(256)
    scan_carry_kernel(const __grid_constant__ ScanForward p, const __grid_constant__ ScanLaunch launch, int values) {
  constexpr int ahead = 8;  // segments whose reads are in flight together, to hide the latency of global memory
  const int64_t thread = threadIdx.y * warp_size + threadIdx.x, threads = blockDim.y * warp_size;
  for (int64_t i = blockIdx.x * threads + thread; i < carries(p, values); i += gridDim.x * threads) {
    const int64_t channel = i % p.channels, n = i / p.channels % p.state, direction = i / p.channels / p.state % 2;
    const int64_t batch = i / p.channels / p.state / 2 % p.batch;
    const int value = static_cast<int>(i / p.channels / p.state / 2 / p.batch) + 1;
    const bool ascending = (direction == 0) == (value == 1);  // the gradient's scan runs the other way
    const auto entry = [&](int64_t s) {
      const int64_t segment = ascending ? s : launch.segments - 1 - s;
      return handed_on<Acc>(p, launch, values, batch, segment, direction, n) + channel;
    };
    Acc carry = Acc(0);
    for (int64_t first = 0; first < launch.segments; first += ahead) {
      Acc decay[ahead], handed[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j)
        if (first + j < launch.segments) {
          decay[j] = entry(first + j)[0];
          handed[j] = entry(first + j)[value * p.channels];
        }
#pragma unroll
      for (int j = 0; j < ahead; ++j)
        if (first + j < launch.segments) {
          entry(first + j)[value * p.channels] = carry;
          carry = decay[j] * carry + handed[j];
        }
    }
  }
}

/// Launches a scan kernel once, or for several segments in its two passes with scan_carry_kernel between them.
template <typename Acc, typename P, typename Kernel>
cudaError_t launch_scan(Kernel kernel, const P& p, const ScanLaunch& launch, int values, cudaStream_t stream) {
  if (launch.segments == 1) return launch_kernel(kernel, launch, stream, p, launch, Pass::whole);
  cudaError_t error = launch_kernel(kernel, launch, stream, p, launch, Pass::collect);
  if (error != cudaSuccess) return error;
  const Launch carry_launch = {ceil_div(carries(p, values), 256), 8, 0};
  error =
      launch_kernel(scan_carry_kernel<Acc>, carry_launch, stream, static_cast<const ScanForward&>(p), launch, values);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, launch, stream, p, launch, Pass::finish);
}

}  // namespace mobilemamba::cuda
