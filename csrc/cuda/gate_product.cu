// The gate after the scan and the output product that follows it as one kernel, and the ReLU of the identity part. A
// block normalizes and gates a tile of rows into shared memory, which a tensor-core product then takes from there.
#include "cuda/gate_rows.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/row_tile.cuh"

namespace mobilemamba::cuda {
namespace {

constexpr int rows_together = 2;  // of a warp: their loads are under way together

/// Writes gated rows of the tile to shared memory, those of this warp, with zeros after the last channel. On the way it
/// computes the ReLU of the identity part.
template <typename T, int parts, int rows_of_warp>
__device__ __forceinline__ void gate_tile(const GateProduct& p, const RowTileLaunch& launch, int64_t first_row) {
  const GateForward& gate = p.gate;
  const int channels = static_cast<int>(gate.channels), identity_channels = static_cast<int>(p.identity_channels);
  constexpr int identity_parts = gate_product_most_identity / warp_size;
#pragma unroll 1
  for (int begin = 0; begin < rows_of_warp; begin += rows_together) {
    const int tile_row = threadIdx.y * rows_of_warp + begin;
    const auto row_of = [&](int i) {  // rows beyond the last one are not stored
      const int64_t row = first_row + tile_row + i;
      return row < gate.rows ? row : gate.rows - 1;
    };
    GateRows<T, parts, rows_together> rows;
    rows.load(gate, row_of);
    T identity[rows_together][identity_parts];
#pragma unroll
    for (int i = 0; i < rows_together * identity_parts; ++i) {
      const int row = i / identity_parts, channel = i % identity_parts * warp_size + threadIdx.x;
      identity[row][i % identity_parts] =
          channel < identity_channels ? static_cast<const T*>(p.identity)[row_of(row) * p.identity_row + channel]
                                      : narrow<T>(0.0f);
    }
    rows.normalize(gate);
    const auto place_of_row = [&](int i) {
      return reinterpret_cast<T*>(shared_memory + (tile_row + i) * launch.pitch);
    };
    rows.gated(gate, [&](int i, int channel, const auto& elements) {
      *reinterpret_cast<std::remove_cvref_t<decltype(elements)>*>(place_of_row(i) + channel) = elements;
    });
#pragma unroll 1
    for (int channel = channels + threadIdx.x; channel < launch.steps * 16; channel += warp_size)
#pragma unroll
      for (int i = 0; i < rows_together; ++i)
        place_of_row(i)[channel] = narrow<T>(0.0f);
#pragma unroll
    for (int i = 0; i < rows_together * identity_parts; ++i) {
      const int row = i / identity_parts, channel = i % identity_parts * warp_size + threadIdx.x;
      if (channel < identity_channels && first_row + tile_row + row < gate.rows)
        static_cast<T*>(p.identity_output)[row_of(row) * p.output_row + channel] =
            narrow<T>(max(widen(identity[row][i % identity_parts]), 0.0f));
    }
  }
}

/// `across`: warps that share rows.
template <typename T, int across>
__global__ void __launch_bounds__(across * gate_product_most_down * warp_size, 16 / (across * gate_product_most_down))
    gate_product_kernel(const __grid_constant__ GateProduct p, const __grid_constant__ RowTileLaunch launch) {
  constexpr int blocks = gate_product_blocks;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int first_output = warp % across * 16 + lane / 4 * 2, first_lane_row = warp / across * 32 + lane % 4 * 2;
  TileProduct<T, across, blocks, gate_product_slice_steps<across>> product(p.product_weight, launch);

  for (int64_t tile = blockIdx.x; tile < launch.tasks; tile += gridDim.x) {
    const int64_t first_row = tile * launch.rows;
    __syncthreads();  // all warps have read the previous tile
    product.begin();
    gate_tile<T, gate_product_parts<across>, 32 / across>(p, launch, first_row);

    float sum[blocks][4][4];
    begin_sums<T, across * 16>(sum, static_cast<const T*>(p.output), p.output_row, first_row + first_lane_row,
                               p.gate.rows, first_output, p.out_channels);
    product.add(sum);

    const LaneOutputs<blocks, 2, across * 16> outputs(p.product_bias, p.out_channels, first_output);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value[blocks][2];
#pragma unroll
      for (int j = 0; j < 2 * blocks; ++j)
        value[j / 2][j % 2] = sum[j / 2][i / 2][j % 2 * 2 + i % 2];
      outputs.add_bias(value);
#pragma unroll
      for (int j = 0; j < 2 * blocks; ++j)
        value[j / 2][j % 2] = max(value[j / 2][j % 2], 0.0f);
      if (const int64_t row = first_row + first_lane_row + i / 2 * 8 + i % 2; row < p.gate.rows)
        outputs.template write<T, true>(static_cast<T*>(p.output) + row * p.output_row, true, value);
    }
  }
}

}  // namespace

cudaError_t gate_product(const GateProduct& p, const RowTileLaunch& launch, cudaStream_t stream) {
  const auto run = [&]<typename T>() {
    return launch_kernel(launch.across == 2 ? gate_product_kernel<T, 2> : gate_product_kernel<T, 4>, launch, stream, p,
                         launch);
  };
  return p.gate.dtype == DType::float16 ? run.template operator()<__half>() : run.template operator()<__nv_bfloat16>();
}

}  // namespace mobilemamba::cuda
