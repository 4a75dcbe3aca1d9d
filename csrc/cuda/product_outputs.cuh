// What follows the sums of a product: bias, residuals, activation, one rounding.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace mobilemamba::cuda {

/// 16 bytes, which are the unit of every copy.
template <typename T>
using Chunk = Channels<T, 16 / sizeof(T)>;

/// The outputs of a lane in each of its rows: `pieces` of `size` adjacent ones, `distance` apart.
template <int pieces, int size, int distance = 16>
struct LaneOutputs {
  int64_t first;
  int count[pieces];  // that exist
  float bias[pieces][size];

  /// `bias`: of all outputs, or null.
  __device__ LaneOutputs(const void* all_bias, int64_t out_channels, int64_t first) : first(first) {
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
      const int64_t left = out_channels - first - piece * distance;
      count[piece] = left >= size ? size : left > 0 ? static_cast<int>(left) : 0;
#pragma unroll
      for (int i = 0; i < size; ++i)
        bias[piece][i] = 0.0f;
      if (all_bias)
#pragma unroll
        for (int i = 0; i < size; ++i)
          if (i < count[piece]) bias[piece][i] = static_cast<const float*>(all_bias)[first + piece * distance + i];
    }
  }

  __device__ __forceinline__ void add_bias(float (&value)[pieces][size]) const {
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece)
#pragma unroll
      for (int i = 0; i < size; ++i)
        value[piece][i] += bias[piece][i];
  }

  /// Adds the elements of a row that begins at `row`.
  template <typename T, bool always_whole>
  __device__ __forceinline__ void add(const void* row, bool aligned, float (&value)[pieces][size]) const {
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
      const T* from = static_cast<const T*>(row) + first + piece * distance;
      if (always_whole || (aligned && count[piece] == size)) {
        if (count[piece] == 0) continue;
        const Channels<T, size> elements = load_channels<T, size>(from);
#pragma unroll
        for (int i = 0; i < size; ++i)
          value[piece][i] += widen(elements.value[i]);
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i)
          if (i < count[piece]) value[piece][i] += widen(from[i]);
      }
    }
  }

  /// Rounds and writes the outputs of a row that begins at `row`.
  template <typename T, bool always_whole>
  __device__ __forceinline__ void write(void* row, bool aligned, const float (&value)[pieces][size]) const {
#pragma unroll
    for (int piece = 0; piece < pieces; ++piece) {
      T* to = static_cast<T*>(row) + first + piece * distance;
      Channels<T, size> elements;
#pragma unroll
      for (int i = 0; i < size; ++i)
        elements.value[i] = narrow<T>(value[piece][i]);
      if (always_whole || (aligned && count[piece] == size)) {
        if (count[piece] > 0) store_channels(to, elements);
      } else {
#pragma unroll
        for (int i = 0; i < size; ++i)
          if (i < count[piece]) to[i] = elements.value[i];
      }
    }
  }

  /// Stores the outputs of a row. `value` has their sums. `always_whole`: for what launch.whole_outputs says, in a
  /// fraction of the code.
  template <typename T, bool always_whole>
  __device__ __forceinline__ void store(const PackedConvForward& p, const ProductLaunch& launch, int64_t row,
                                        float (&value)[pieces][size]) const {
    const auto add_residual = [&] {
      add<T, always_whole>(static_cast<const T*>(p.residual) + row * p.residual_row, launch.aligned_residual, value);
    };
    add_bias(value);
    if (p.residual && p.residual_inside) add_residual();
    if (p.activation == Activation::relu)
#pragma unroll
      for (int piece = 0; piece < pieces; ++piece)
#pragma unroll
        for (int i = 0; i < size; ++i)
          value[piece][i] = max(value[piece][i], 0.0f);
    if (p.residual && !p.residual_inside) add_residual();
    if (p.second_residual)
      add<T, always_whole>(static_cast<const T*>(p.second_residual) + row * p.second_residual_row,
                           launch.aligned_second, value);
    write<T, always_whole>(static_cast<T*>(p.output) + row * p.output_row, launch.aligned_output, value);
  }
};

}  // namespace mobilemamba::cuda
