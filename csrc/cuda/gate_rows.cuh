// Rows of the gate in a warp's registers.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch_rows.h"
#include "kernels/gate.h"

namespace mobilemamba::cuda {

/// `count` rows that are read once, whose loads and sums wait for each other's latency. A lane has `parts` times
/// `gate_together` channels of each.
template <typename T, int parts, int count>
class GateRows {
 public:
  using Elements = Channels<T, gate_together>;

  /// row_of(i): the number of row i.
  template <typename RowOf>
  __device__ __forceinline__ void load(const GateForward& p, RowOf&& row_of) {
    const int channels = static_cast<int>(p.channels);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const T* const y = static_cast<const T*>(p.y) + row_of(i) * p.channels;
      const T* const z = static_cast<const T*>(p.z) + row_of(i) * p.z_row;
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        y_[i][part] = z_[i][part] = Elements{};  // without it, earlier rows would stay in registers
        if (const int c = channel_of(part); c < channels) {
          y_[i][part] = load_channels<T, gate_together>(y + c);
          z_[i][part] = load_channels<T, gate_together>(z + c);
        }
      }
    }
  }

  /// Computes the moments.
  __device__ __forceinline__ void normalize(const GateForward& p) {
    const int channels = static_cast<int>(p.channels);
    const float share = 1.0f / static_cast<float>(channels);
    float squares[count] = {};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      mean_[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < parts * gate_together; ++j)
        mean_[i] += widen(y_[i][j / gate_together].value[j % gate_together]);
    }
    sum_over_warp(mean_);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      mean_[i] *= share;
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        const Elements y = again(y_[i][part]);
#pragma unroll
        for (int j = 0; j < gate_together; ++j) {
          const float difference = channel_of(part) < channels ? widen(y.value[j]) - mean_[i] : 0.0f;
          squares[i] += difference * difference;
        }
      }
    }
    sum_over_warp(squares);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float variance = squares[i] * share + static_cast<float>(p.eps);
      if constexpr (sizeof(T) == 2)
        scale_[i] = fast_reciprocal_sqrt(variance);
      else
        scale_[i] = 1.0f / sqrt(variance);
    }
  }

  /// Calls store(i, channel, elements) for all parts of the gated rows.
  template <typename Store>
  __device__ __forceinline__ void gated(const GateForward& p, Store&& store) const {
    using Parameters = Channels<float, gate_together>;
    const int channels = static_cast<int>(p.channels);
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const int c = channel_of(part);
      if (c >= channels) continue;
      const Parameters weight = load_channels<float, gate_together>(static_cast<const float*>(p.weight) + c);
      const Parameters bias = load_channels<float, gate_together>(static_cast<const float*>(p.bias) + c);
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const Elements y = again(y_[i][part]);
        Elements output;
#pragma unroll
        for (int j = 0; j < gate_together; ++j) {
          const float z = widen(z_[i][part].value[j]), normalized = (widen(y.value[j]) - mean_[i]) * scale_[i];
          output.value[j] = narrow<T>((normalized * weight.value[j] + bias.value[j]) * (z * sigmoid_of<T>(z)));
        }
        store(i, c, output);
      }
    }
  }

 private:
  static __device__ __forceinline__ int channel_of(int part) {
    return (part * warp_size + static_cast<int>(threadIdx.x)) * gate_together;
  }

  static __device__ __forceinline__ void sum_over_warp(float (&value)[count]) {
#pragma unroll
    for (int distance = warp_size / 2; distance >= 1; distance /= 2)
#pragma unroll
      for (int i = 0; i < count; ++i)
        value[i] += __shfl_xor_sync(0xffffffff, value[i], distance);
  }

  /// Keeps the compiler from holding all elements of the rows in float32 too, which takes twice the registers.
  static __device__ __forceinline__ Elements again(const Elements& elements) {
#ifdef __CUDACC__
    if constexpr (sizeof(T) == 2) {
      uint2 word;
      memcpy(&word, &elements, sizeof(word));
      asm volatile("" : "+r"(word.x), "+r"(word.y));
      Elements same;
      memcpy(&same, &word, sizeof(word));
      return same;
    }
#endif
    return elements;
  }

  Elements y_[count][parts], z_[count][parts];
  float mean_[count], scale_[count];
};

}  // namespace mobilemamba::cuda
