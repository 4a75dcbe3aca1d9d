// The product of a tile of rows in shared memory and a packed weight, whose slices come through shared memory. A warp
// computes 32 rows by some blocks of 16 outputs. Warps beside each other share the rows: block number b of a warp is
// block `b * across + warp` of all outputs.
#pragma once

#include "cuda/launch_rows.h"
#include "cuda/product_outputs.cuh"
#include "cuda/tensor_core.cuh"

namespace mobilemamba::cuda {

constexpr int step_pairs = 8;  // of adjacent inputs in an instruction
constexpr int step_quads = step_pairs / 4;
constexpr int pair_bytes = 128;  // of a panel's pair: 32 outputs
constexpr int pair_chunks = 8;   // of 16 bytes

/// Where a chunk of a pair is among the pair's chunks. The words that half a warp reads together, of four pairs and
/// eight outputs, are in different banks.
__device__ __forceinline__ int place_of(int chunk, int pair) {
  return chunk ^ (pair % 4 * 2);
}

/// A warp copies four pairs of panel number `panel` of a weight to shared memory at a time: of `quads` times four
/// pairs, every `step`-th four from number `quad` on. `shared`: where the panel's pairs begin, which are there between
/// those of `panels` panels. Pairs beyond the weight's become zero.
template <typename T, int panels>
__device__ __forceinline__ void copy_panel(const void* weight, int all_panels, int all_pairs, int panel, int first_pair,
                                           int quad, int quads, int step, unsigned char* shared) {
  const int chunk = threadIdx.x % pair_chunks, pair = quad * 4 + threadIdx.x / pair_chunks;
  const Chunk<T>* from =
      static_cast<const Chunk<T>*>(weight) + (panel * all_pairs + first_pair + pair) * pair_chunks + chunk;
  int left = panel < all_panels ? all_pairs - first_pair - pair : 0;
  shared += pair * panels * pair_bytes + place_of(chunk, pair) * 16;
#pragma unroll 1
  for (; quad < quads; quad += step) {
    copy_async(shared, from, left > 0 ? 16 : 0);
    from += step * 4 * pair_chunks;
    left -= step * 4;
    shared += step * 4 * panels * pair_bytes;
  }
}

/// sum += weight * rows for 16 inputs, `blocks` times 16 outputs and 32 rows. The weight is the left side: a lane reads
/// two adjacent words of it at a time, which are rows `lane / 4` and `lane / 4 + 8` of the instruction, and its sums
/// are those of the adjacent outputs 2 * (lane / 4) and 2 * (lane / 4) + 1. `panels`: of a pair in shared memory;
/// `apart`: bytes from block to block.
template <typename T, int panels, int apart, int blocks>
__device__ __forceinline__ void multiply(float (&sum)[blocks][4][4], const unsigned char* weight,
                                         const unsigned char* rows, int pitch) {
  uint32_t b[2][4];
  load_matrices(b[0], rows);
  load_matrices(b[1], rows + 16 * pitch);
#pragma unroll
  for (int block = 0; block < blocks; ++block) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto words = load_channels<uint32_t, 2>(
          reinterpret_cast<const uint32_t*>(weight + block * apart + i * 4 * panels * pair_bytes));
      a[2 * i] = words.value[0];
      a[2 * i + 1] = words.value[1];
    }
#pragma unroll
    for (int eight = 0; eight < 4; ++eight) {
      const uint32_t half[2] = {b[eight / 2][eight % 2 * 2], b[eight / 2][eight % 2 * 2 + 1]};
      multiply_add<T>(sum[block][eight], a, half);
    }
  }
}

constexpr int tile_product_stages = 3;

/// The product of the block's tile and a weight of up to `across * blocks` times 16 outputs. All warps call each
/// function, `begin` once a tile, when all have read the slices of the previous one.
template <typename T, int across, int blocks, int slice_steps>
class TileProduct {
 public:
  __device__ TileProduct(const void* weight, const RowTileLaunch& launch)
      : weight_(weight), launch_(launch), stages_(shared_memory + launch.rows * launch.pitch) {}

  /// Starts the copies of the first slices.
  __device__ __forceinline__ void begin() {
    copied_ = 0;
#pragma unroll 1
    for (int i = 0; i < tile_product_stages - 1; ++i)
      copy();
  }

  /// Adds the product of this warp's rows, when its first barrier has shown them to all warps.
  __device__ __forceinline__ void add(float (&sum)[blocks][4][4]) {
    const int lane = threadIdx.x, group = lane / 4, quad = lane % 4, pitch = launch_.pitch;
    const int warp = threadIdx.y % across, first_row = threadIdx.y / across * 32;
    const int weight_at =
        (quad * panels + warp / 2) * pair_bytes + place_of(warp % 2 * 4 + group / 2, quad) * 16 + group % 2 * 8;
    const unsigned char* rows = shared_memory + (first_row + lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
#pragma unroll 1
    for (int slice = 0; slice < launch_.slices; ++slice) {
      wait_for_copies<tile_product_stages - 2>();
      __syncthreads();  // this slice and the tile are there; the place of the next copy has been read
      copy();
      const unsigned char* weight = stages_ + slice % tile_product_stages * stage_bytes + weight_at;
#pragma unroll
      for (int step = 0; step < slice_steps; ++step)
        multiply<T, panels, across / 2 * pair_bytes>(sum, weight + step * step_pairs * panels * pair_bytes,
                                                     rows + step * 32, pitch);
      rows += slice_steps * 32;
    }
  }

 private:
  static constexpr int panels = across * blocks / 2, stage_bytes = slice_steps * panels * step_pairs * pair_bytes;

  __device__ __forceinline__ void copy() {
    if (copied_ < launch_.slices) {
      unsigned char* const to = stages_ + copied_ % tile_product_stages * stage_bytes;
#pragma unroll 1
      for (int panel = threadIdx.y; panel < panels; panel += launch_.warps)
        copy_panel<T, panels>(weight_, launch_.panels, launch_.pairs, panel, copied_ * slice_steps * step_pairs, 0,
                              slice_steps * step_quads, 1, to + panel * pair_bytes);
      ++copied_;
    }
    commit_copies();
  }

  const void* weight_;
  const RowTileLaunch& launch_;
  unsigned char* stages_;
  int copied_;
};

/// The sums begin with elements of rows in global memory: of the lane's two rows of every eight, from `first_lane_row`
/// on, which pairs of adjacent elements hold. All loads are under way together. Rows and outputs beyond the last one
/// read others instead.
template <typename T, int apart, int blocks>
__device__ __forceinline__ void begin_sums(float (&sum)[blocks][4][4], const T* rows, int64_t stride,
                                           int64_t first_lane_row, int64_t all_rows, int first_output,
                                           int64_t all_outputs) {
  Channels<T, 2> pair[8][blocks];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t row = first_lane_row + i / 2 * 8 + i % 2;
    const T* const from = rows + (row < all_rows ? row : all_rows - 1) * stride;
#pragma unroll
    for (int block = 0; block < blocks; ++block) {
      const int output = first_output + block * apart;
      pair[i][block] = load_channels<T, 2>(from + (output < all_outputs ? output : 0));
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int block = 0; block < blocks; ++block)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        sum[block][i / 2][j * 2 + i % 2] = widen(pair[i][block].value[j]);
}

}  // namespace mobilemamba::cuda
