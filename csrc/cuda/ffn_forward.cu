// The feed-forward layer as one kernel on tensor cores. A block keeps a tile of the input's rows in shared memory and
// the sums of the output in registers. It computes the hidden activations of a part of the hidden channels at a time,
// rounds them to shared memory, and adds their products to the sums. Both weights come through shared memory in slices,
// several slices ahead.
//
// A warp computes 32 rows by `blocks` times 16 outputs. Warps beside each other share the rows: so each needs the
// hidden activations that the others have computed, and a slice of the weight is read by `launch.down` warps instead of
// all.
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/product_outputs.cuh"
#include "cuda/row_tile.cuh"

namespace mobilemamba::cuda {
namespace {

/// Copies `chunks` chunks of each row of the tile, from `first_chunk` on, to shared memory. What is beyond the last row
/// or channel becomes zero.
template <typename T>
__device__ __forceinline__ void copy_input(const FfnForward& p, const FfnLaunch& launch, int64_t first_row,
                                           int first_chunk, int chunks, unsigned char* shared, int thread,
                                           int threads) {
  constexpr int together = sizeof(Chunk<T>) / sizeof(T);
  const T* input = static_cast<const T*>(p.input);
  for (int i = thread; i < launch.rows * chunks; i += threads) {
    const int row = i / chunks, chunk = first_chunk + i - row * chunks, channel = chunk * together;
    const int64_t left = first_row + row < p.rows ? p.channels - channel : 0;
    const T* from = input + (first_row + row) * p.input_row + channel;
    unsigned char* to = shared + row * launch.input_pitch + chunk * 16;
    if (launch.aligned) {
      copy_async(to, left > 0 ? from : input, left > 0 ? 16 : 0);
    } else {
      Chunk<T> elements;
#pragma unroll
      for (int element = 0; element < together; ++element)
        elements.value[element] = element < left ? from[element] : narrow<T>(0.0f);
      *reinterpret_cast<Chunk<T>*>(to) = elements;
    }
  }
}

/// `across`: warps that share rows. Block number b of a warp is block `b * across + warp` of the outputs, or of the
/// hidden channels of a part.
template <typename T, int across, int blocks>
__global__ void __launch_bounds__(ffn_most_warps* warp_size, 1)
    ffn_forward_kernel(const __grid_constant__ FfnForward p, const __grid_constant__ FfnLaunch launch) {
  constexpr int hidden_blocks = ffn_hidden_blocks, apart = across / 2 * pair_bytes;
  constexpr int expand_panels = across * hidden_blocks / 2, project_panels = (across * blocks + 1) / 2;
  constexpr int part = across * hidden_blocks * 16;  // hidden channels
  constexpr int hidden_pitch = part * 2 + 16;        // bytes; rows are in different banks
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * warp_size + lane, group = lane / 4, quad = lane % 4;
  const int threads = launch.warps * warp_size, warp_across = warp % across, warp_row = warp / across * 32;
  const int pitch = launch.input_pitch;
  unsigned char* const hidden_tile = shared_memory + launch.rows * pitch;
  unsigned char* const stages = hidden_tile + launch.rows * hidden_pitch;
  // Where this lane's words of a block of the weight are in a pair, and its rows in a tile.
  const int weight_place = place_of(warp_across % 2 * 4 + group / 2, quad) * 16 + group % 2 * 8;
  const int expand_at = (quad * expand_panels + warp_across / 2) * pair_bytes + weight_place;
  const int project_at = (quad * project_panels + warp_across / 2) * pair_bytes + weight_place;
  const int matrix_row = warp_row + lane / 16 * 8 + lane % 8, matrix_chunk = lane / 8 % 2 * 16;
  const unsigned char* const input_at = shared_memory + matrix_row * pitch + matrix_chunk;
  const unsigned char* const hidden_at = hidden_tile + matrix_row * hidden_pitch + matrix_chunk;
  const int first_lane_row = warp_row + quad * 2, first_output = warp_across * 16 + group * 2;
  const int hidden_channels = static_cast<int>(p.hidden);
  const auto steps_of = [&](int expand_slice) {
    const int left = launch.steps - expand_slice * launch.expand_steps;
    return left < launch.expand_steps ? left : launch.expand_steps;
  };

  for (int64_t tile = blockIdx.x; tile < launch.tasks; tile += gridDim.x) {
    const int64_t first_row = tile * launch.rows;
    __syncthreads();  // all warps have read the previous tile
    int copied_part = 0, copied_slice = 0, copied_stage = 0;
    const auto copy = [&] {
      if (copied_part < launch.parts) {
        unsigned char* const to = stages + copied_stage * launch.stage_bytes;
        if (++copied_stage == ffn_stages) copied_stage = 0;
        if (const int slice = copied_slice - launch.expand_slices; slice < 0) {
          const int first = copied_slice * launch.expand_steps;
          if (copied_part == 0)
            copy_input<T>(p, launch, first_row, first * 2, steps_of(copied_slice) * 2, shared_memory, thread, threads);
          copy_panel<T, expand_panels>(p.expand_weight, launch.expand_panels, launch.expand_pairs,
                                       copied_part * expand_panels + warp_across, first * step_pairs, warp / across,
                                       launch.expand_steps * step_quads, launch.rows / 32,
                                       to + warp_across * pair_bytes);
        } else {
          const int first = copied_part * (part / 2) + slice * launch.project_steps * step_pairs;
#pragma unroll 1
          for (int panel = warp; panel < project_panels; panel += launch.warps)
            copy_panel<T, project_panels>(p.project_weight, launch.project_panels, launch.project_pairs, panel, first,
                                          0, launch.project_steps * step_quads, 1, to + panel * pair_bytes);
        }
        if (++copied_slice == launch.expand_slices + launch.project_slices) copied_slice = 0, ++copied_part;
      }
      commit_copies();
    };
#pragma unroll 1
    for (int i = 0; i < ffn_stages - 1; ++i)
      copy();

    int read_stage = 0;
    const auto next_slice = [&] {
      wait_for_copies<ffn_stages - 2>();
      __syncthreads();  // this slice is there, and all warps have read the one whose place the next copy takes
      copy();
      const unsigned char* const stage = stages + read_stage * launch.stage_bytes;
      if (++read_stage == ffn_stages) read_stage = 0;
      return stage;
    };

    float sum[blocks][4][4] = {};
    if (p.residual && launch.whole_outputs)
      begin_sums<T, across * 16>(sum, static_cast<const T*>(p.residual), p.residual_row, first_row + first_lane_row,
                                 p.rows, first_output, p.channels);
#pragma unroll 1
    for (int number = 0; number < launch.parts; ++number) {
      float hidden[hidden_blocks][4][4];  // the sums begin with the bias
#pragma unroll
      for (int i = 0; i < hidden_blocks * 2; ++i) {
        const int channel = number * part + (i / 2 * across + warp_across) * 16 + group * 2 + i % 2;
        const float bias = channel < hidden_channels ? static_cast<const float*>(p.expand_bias)[channel] : 0.0f;
#pragma unroll
        for (int eight = 0; eight < 4; ++eight)
          hidden[i / 2][eight][i % 2 * 2] = hidden[i / 2][eight][i % 2 * 2 + 1] = bias;
      }
      const unsigned char* rows = input_at;
#pragma unroll 1
      for (int slice = 0; slice < launch.expand_slices; ++slice) {
        const unsigned char* weight = next_slice() + expand_at;
        const int steps = steps_of(slice);
#pragma unroll(blocks == 6 ? 2 : 1)
        for (int step = 0; step < steps; ++step) {
          multiply<T, expand_panels, apart>(hidden, weight, rows, pitch);
          weight += step_pairs * expand_panels * pair_bytes;
          rows += 32;
        }
      }

#pragma unroll
      for (int block = 0; block < hidden_blocks; ++block) {
        const int channel = (block * across + warp_across) * 16 + group * 2;
        const int left = hidden_channels - number * part - channel;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          Channels<T, 2> pair;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float value = max(hidden[block][i / 2][j * 2 + i % 2], 0.0f);
            pair.value[j] = narrow<T>(j < left ? value : 0.0f);  // beyond the last channel infinity * 0 may be there
          }
          store_channels(
              reinterpret_cast<T*>(hidden_tile + (warp_row + i / 2 * 8 + quad * 2 + i % 2) * hidden_pitch) + channel,
              pair);
        }
      }

      rows = hidden_at;
#pragma unroll 1
      for (int slice = 0; slice < launch.project_slices; ++slice) {
        const unsigned char* weight = next_slice() + project_at;  // its barrier: the hidden activations are there
#pragma unroll 1
        for (int step = 0; step < launch.project_steps; ++step) {
          multiply<T, project_panels, apart>(sum, weight, rows, hidden_pitch);
          weight += step_pairs * project_panels * pair_bytes;
          rows += 32;
        }
      }
    }

    const LaneOutputs<blocks, 2, across * 16> outputs(p.project_bias, p.channels, first_output);
    const auto value_of = [&](int i, float (&value)[blocks][2]) {  // of the lane's row i: two rows of every eight
#pragma unroll
      for (int block = 0; block < blocks; ++block)
#pragma unroll
        for (int output = 0; output < 2; ++output)
          value[block][output] = sum[block][i / 2][output * 2 + i % 2];
    };
    const auto finish = [&]<bool whole>(int i, float (&value)[blocks][2]) {
      const int row = first_lane_row + i / 2 * 8 + i % 2;
      if (first_row + row >= p.rows) return;
      outputs.add_bias(value);
      outputs.template add<T, whole>(shared_memory + row * pitch, true, value);
      if (p.residual && !whole)
        outputs.template add<T, false>(static_cast<const T*>(p.residual) + (first_row + row) * p.residual_row,
                                       launch.aligned_residual, value);
      outputs.template write<T, whole>(static_cast<T*>(p.output) + (first_row + row) * p.output_row,
                                       launch.aligned_output, value);
    };
    if (launch.whole_outputs) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float value[blocks][2];
        value_of(i, value);
        finish.template operator()<true>(i, value);
      }
    } else {
      // Unrolled, this code would leave the instruction cache: these sums go through the thread's memory instead.
      float value[8][blocks][2];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        value_of(i, value[i]);
#pragma unroll 1
      for (int i = 0; i < 8; ++i)
        finish.template operator()<false>(i, value[i]);
    }
  }
}

}  // namespace

cudaError_t ffn_forward(const FfnForward& p, const FfnLaunch& launch, cudaStream_t stream) {
  const auto run = [&]<int across, int blocks>() {
    return p.dtype == DType::float16
               ? launch_kernel(ffn_forward_kernel<__half, across, blocks>, launch, stream, p, launch)
               : launch_kernel(ffn_forward_kernel<__nv_bfloat16, across, blocks>, launch, stream, p, launch);
  };
  if (launch.across == 2) return launch.blocks == 6 ? run.template operator()<2, 6>() : run.template operator()<2, 7>();
  return launch.blocks == 6 ? run.template operator()<4, 6>() : run.template operator()<4, 7>();
}

}  // namespace mobilemamba::cuda
