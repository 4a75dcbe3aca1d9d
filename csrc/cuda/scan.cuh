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

// For small step sizes the errors of the fast functions would show: there a short series replaces them.

/// exp(dt * A), where `A` is in the form of rate_of.
template <typename T, typename Acc>
__device__ __forceinline__ Acc decay_of(Acc dt, Acc A) {
  if constexpr (sizeof(T) == 2)
    return fast_exp2(dt * A);
  else
    return exp(dt * A);
}

/// A = -exp(A_log), for the fast exponential to the base 2.
template <typename T, typename Acc>
__device__ __forceinline__ Acc rate_of(Acc A) {
  return sizeof(T) == 2 ? A * Acc(log2_of_e) : A;
}

template <typename T, typename Acc>
__device__ __forceinline__ Acc step_size_of(Acc x) {
  if constexpr (sizeof(T) == 2) {
    const float e = fast_exp2(-log2_of_e * fabsf(x));
    const float small = e * (1.0f - e * (0.5f - e * (1.0f / 3.0f)));
    return fmaxf(x, 0.0f) + (e < 0.01f ? small : log_of_2 * fast_log2(1.0f + e));
  } else {
    return softplus(x);
  }
}

/// sigmoid(x) for the x whose softplus is `dt`.
template <typename T, typename Acc>
__device__ __forceinline__ Acc step_size_derivative_of(Acc dt) {
  if constexpr (sizeof(T) == 2)
    return dt < 0.01f ? dt * (1.0f - dt * (0.5f - dt * (1.0f / 6.0f))) : 1.0f - fast_exp2(-log2_of_e * dt);
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
  Acc* const staged;    // rows of `staged_pitch` elements, of which `chunk_length` are used
  const bool together;  // all rows of both directions are staged
  const int lane;
  int64_t batch, segment, tile, begin, channel;
  int length;   // in positions: less than chunk_length at the end of the sequence
  bool active;  // false in lanes past the last channel

  __device__ Chunk(const ScanForward& p, const ScanLaunch& launch, int64_t task, Acc* staged)
      : p(p), staged(staged), together(launch.together), lane(threadIdx.x) {
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
    for (int t = 0; t < chunk_length; ++t, from += position_stride)
      x[t] = active && t < length ? widen(*from) : Acc(0);
  }

  /// Writes this channel's elements of a contiguous (B, L, D) tensor.
  __device__ void store(void* data, const Acc (&x)[chunk_length]) const {
    T* to = static_cast<T*>(data) + (batch * p.length + begin) * p.channels + channel;
#pragma unroll
    for (int t = 0; t < chunk_length; ++t, to += p.channels)
      if (active && t < length) *to = narrow<T>(x[t]);
  }

  /// This channel's element of a parameter (2, rows, D).
  __device__ Acc parameter(const void* data, int64_t direction, int64_t row, int64_t rows) const {
    return static_cast<const Acc*>(data)[(direction * rows + row) * p.channels + channel];
  }

  /// Copies `count` rows of the chunk's positions to row `to` of shared memory and after; zero past the sequence's end.
  /// Neighbouring lanes take neighbouring rows, which are neighbours in memory in the model's layout.
  __device__ void stage(const ScanRows& rows, int64_t direction, int64_t first, int count, int to) const {
    const T* from = static_cast<const T*>(rows.data) + batch * rows.batch + direction * rows.direction +
                    first * rows.row + begin * rows.position;
#pragma unroll 4
    for (int i = lane; i < count * chunk_length; i += warp_size) {
      const int t = i / count, row = i % count;
      staged[(to + row) * staged_pitch + t] = t < length ? widen(from[row * rows.row + t * rows.position]) : Acc(0);
    }
  }

  /// Where all rows have a place, copies those of both directions.
  __device__ void stage_together() const {
    if (!together) return;
    const int rank = static_cast<int>(p.rank), states = static_cast<int>(p.state), rows = rank + 2 * states;
    __syncwarp();  // all lanes have read the previous rows
    // In the model's layout neighbouring lanes read neighbours in memory.
    for (int both = lane; both < 2 * rows; both += warp_size) {
      const int direction = both >= rows, row = both - direction * rows;
      const ScanRows& source = row < rank ? p.delta : row < rank + states ? p.B : p.C;
      const int within = row < rank ? row : row < rank + states ? row - rank : row - rank - states;
      const T* from = static_cast<const T*>(source.data) + batch * source.batch + direction * source.direction +
                      within * source.row + begin * source.position;
      Acc* to = staged + both * staged_pitch;
#pragma unroll
      for (int t = 0; t < chunk_length; ++t, from += source.position)
        to[t] = t < length ? widen(*from) : Acc(0);
    }
    __syncwarp();
  }

  /// The chunk's elements of a staged row, read 16 bytes at a time.
  struct Row {
    Acc value[chunk_length];

    __device__ explicit Row(const Acc* staged) {
      constexpr int together = 16 / sizeof(Acc);
#pragma unroll
      for (int t = 0; t < chunk_length; t += together) {
        const auto part = load_channels<Acc, together>(staged + t);
#pragma unroll
        for (int i = 0; i < together; ++i)
          value[t + i] = part.value[i];
      }
    }
    __device__ Acc operator[](int t) const { return value[t]; }
  };

  /// Calls f(row, values) for each row of delta; `values` are the chunk's elements of the row.
  template <typename F>
  __device__ void for_each_delta_row(int64_t direction, F f) const {
    const int64_t step = together ? p.rank : staged_rows;
    for (int64_t first = 0; first < p.rank; first += step) {
      const int count = static_cast<int>(p.rank - first < step ? p.rank - first : step);
      if (!together) {
        __syncwarp();  // all lanes have read the previous rows
        stage(p.delta, direction, first, count, 0);
        __syncwarp();
      }
      const Acc* rows = together ? staged + direction * p.rows() * staged_pitch : staged;
      for (int row = 0; row < count; ++row)
        f(first + row, Row(rows + row * staged_pitch));
    }
  }

  /// The step size of each position. It is zero past the end of the sequence, so that the state stays as it is.
  __device__ void step_sizes(int64_t direction, Acc (&dt)[chunk_length]) const {
    const Acc bias = parameter(p.dt_bias, direction, 0, 1);
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      dt[t] = bias;
    const Acc* weights = static_cast<const Acc*>(p.dt_weight) + direction * p.rank * p.channels + channel;
    for_each_delta_row(direction, [&](int64_t, const Row& values) {
      const Acc weight = *weights;
      weights += p.channels;
#pragma unroll
      for (int t = 0; t < chunk_length; ++t)
        dt[t] += weight * values[t];
    });
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      dt[t] = t < length ? step_size_of<T>(dt[t]) : Acc(0);
  }

  /// The chunk's elements of B and C of one state, in shared memory.
  struct Inputs {
    const Acc *b, *c;
  };
  __device__ Inputs B_and_C(int64_t direction, int64_t n) const {
    if (together) {
      const Acc* first = staged + static_cast<int>(direction * p.rows() + p.rank + n) * staged_pitch;
      return {first, first + static_cast<int>(p.state) * staged_pitch};
    }
    __syncwarp();
    stage(p.B, direction, n, 1, 0);
    stage(p.C, direction, n, 1, 1);
    __syncwarp();
    return {staged, staged + staged_pitch};
  }

  /// The state's decay at a position, for A in the form of rate_of; 1 past the end of the sequence, for an infinite A
  /// too.
  __device__ Acc decay(int t, Acc dt, Acc A) const { return t < length ? decay_of<T>(dt, A) : Acc(1); }

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
