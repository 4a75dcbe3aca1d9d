// The launch configuration of the kernels that keep a tile of rows in shared memory; see launch.h.
#pragma once

#include "cuda/launch.h"
#include "kernels/conv_product.h"
#include "kernels/ffn.h"
#include "kernels/gate.h"

namespace mobilemamba::cuda {

constexpr int64_t row_step = 16;             // inputs of an instruction
constexpr int64_t row_step_bytes = 8 * 128;  // of a panel: pairs of 32 outputs

/// Whether rows begin at multiples of so many bytes; `stride` and `element` in elements and bytes.
inline bool rows_aligned(int64_t bytes, const void* data, int64_t stride, int64_t element) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride * element % bytes == 0;
}

// The feed-forward layer as one kernel. A block computes a tile of 32 rows for each warp down, and all outputs.

constexpr int ffn_stages = 3;           // slices of the weights in shared memory
constexpr int ffn_most_warps = 12;      // of a block: registers for the sums of 96 rows by 448 outputs
constexpr int ffn_hidden_blocks = 2;    // of 16 hidden channels that a warp computes at a time
constexpr int ffn_most_blocks = 7;      // of 16 outputs of a warp
constexpr int64_t ffn_busy_tiles = 88;  // two thirds of the multiprocessors of a large GPU

struct FfnLaunch : Launch {
  int rows;                           // of a tile
  int across, blocks;                 // warps that share rows; blocks of 16 outputs of a warp
  int steps, parts;                   // of 16 inputs; of the hidden channels
  int expand_slices, expand_steps;    // of a part's first product, and steps of a slice
  int project_slices, project_steps;  // of its second product
  int expand_panels, expand_pairs, project_panels, project_pairs;  // of the weights
  int input_pitch, stage_bytes;
  bool aligned;  // whether each row of the input begins at a multiple of 16 bytes
  bool aligned_residual, aligned_output, whole_outputs;  // as in ProductLaunch, for pairs of outputs

  /// Whether the kernel serves these sizes.
  bool exists() const { return tasks > 0; }
};

/// The launch with `down` times 32 rows in a tile and at most `most_steps` steps in a slice of the first product.
inline FfnLaunch ffn_launch_of(const FfnForward& p, int down, int most_steps) {
  FfnLaunch launch = {};
  launch.rows = 32 * down;
  launch.across = p.channels <= 2 * ffn_most_blocks * 16 ? 2 : 4;
  launch.blocks = p.channels <= launch.across * 6 * 16 ? 6 : ffn_most_blocks;
  launch.warps = launch.across * down;
  launch.tasks = ceil_div(p.rows, launch.rows);
  const int64_t part = launch.across * ffn_hidden_blocks * 16, panel = PackedConvForward::panel;
  const int64_t tile_panels = ceil_div(launch.across * launch.blocks, 2);
  launch.steps = static_cast<int>(ceil_div(p.channels, row_step));
  launch.parts = static_cast<int>(ceil_div(p.hidden, part));
  launch.expand_slices = static_cast<int>(ceil_div(launch.steps, most_steps));
  launch.expand_steps = static_cast<int>(ceil_div(launch.steps, launch.expand_slices));
  launch.project_steps = most_steps > 4 ? 2 : 1;  // a slice of either product has about as many bytes
  launch.project_slices = static_cast<int>(part / row_step / launch.project_steps);
  launch.expand_panels = static_cast<int>(ceil_div(p.hidden, panel));
  launch.expand_pairs = static_cast<int>(ceil_div(p.channels, 2));
  launch.project_panels = static_cast<int>(ceil_div(p.channels, panel));
  launch.project_pairs = static_cast<int>(ceil_div(p.hidden, 2));
  const int64_t expand = part / panel * launch.expand_steps, project = tile_panels * launch.project_steps;
  launch.stage_bytes = static_cast<int>((expand > project ? expand : project) * row_step_bytes);
  // An odd number of chunks of 16 bytes, so that neighbouring rows are in different banks; also of the hidden channels.
  launch.input_pitch = static_cast<int>(launch.steps * 32 + 16);
  launch.shared_bytes =
      launch.rows * (launch.input_pitch + part * 2 + 16) + static_cast<size_t>(ffn_stages) * launch.stage_bytes;
  launch.aligned = rows_aligned(16, p.input, p.input_row, 2) && p.channels % 8 == 0;
  launch.aligned_residual = rows_aligned(4, p.residual, p.residual_row, 2);
  launch.aligned_output = rows_aligned(4, p.output, p.output_row, 2);
  launch.whole_outputs = p.channels % 2 == 0 && launch.aligned_residual && launch.aligned_output;
  return launch;
}

/// The launch of the one kernel, where it is predicted to be faster than two products (benchmarks/NOTES.md); otherwise
/// one that does not exist. `always`: wherever the kernel can run.
inline FfnLaunch ffn_launch(const FfnForward& p, size_t shared_limit, bool always = false) {
  FfnLaunch best = {};
  constexpr int64_t most_hidden = 1 << 16;  // an int counts the chunks of a weight
  if (p.channels > 4 * ffn_most_blocks * 16 || p.hidden > most_hidden || p.rows < 1) return best;
  int64_t best_cost = 0;
  constexpr int long_and_short[] = {7, 4};  // steps of a slice of the first product
  for (const int most_steps : long_and_short) {
    for (int down = 3; down >= 1; --down) {
      const FfnLaunch launch = ffn_launch_of(p, down, most_steps);
      if (launch.shared_bytes > shared_limit) continue;
      const int64_t resident = ffn_most_warps / launch.warps < static_cast<int64_t>(shared_limit / launch.shared_bytes)
                                   ? ffn_most_warps / launch.warps
                                   : static_cast<int64_t>(shared_limit / launch.shared_bytes);
      // A wave of tiles takes as long as their rows, and as the weights' way to the multiprocessor.
      const int64_t cost = ceil_div(launch.tasks, 132 * resident) * resident * (down + 1);
      if (!best.exists() || cost < best_cost) best = launch, best_cost = cost;
    }
    if (best.exists()) break;  // short slices only where no others fit
  }
  const bool enough = best.tasks >= ffn_busy_tiles && best.rows >= 64;
  return always || enough ? best : FfnLaunch{};
}

/// A tile of rows that a kernel computes into shared memory, and its product with a weight.
struct RowTileLaunch : Launch {
  int rows, across;   // of a tile; warps that share rows
  int steps, slices;  // of 16 inputs, and of some steps
  int panels, pairs;  // of the weight
  int pitch;          // bytes from row to row

  bool exists() const { return tasks > 0; }
};

/// The fewest tiles of `down` times 32 rows: larger ones leave no multiprocessor idle. With fewer of the smallest, a
/// few multiprocessors would take longer for both steps than all of them for one after the other (benchmarks/NOTES.md).
inline int64_t row_tiles_wanted(int down, bool always) {
  return down > 1 ? 132 : always ? 1 : 66;
}

/// The launch for `rows` rows of `channels` inputs, in tiles of `down` times 32 rows and slices of `slice_steps` steps
/// of `panels` panels.
inline RowTileLaunch row_tile_launch(int64_t rows, int64_t channels, int64_t out_channels, int across, int down,
                                     int slice_steps, int panels) {
  constexpr int stages = 3;
  RowTileLaunch launch = {};
  launch.rows = 32 * down;
  launch.across = across;
  launch.warps = across * down;
  launch.tasks = ceil_div(rows, launch.rows);
  launch.slices = static_cast<int>(ceil_div(ceil_div(channels, row_step), slice_steps));
  launch.steps = launch.slices * slice_steps;  // the last ones may have zeros only
  launch.panels = static_cast<int>(ceil_div(out_channels, PackedConvForward::panel));
  launch.pairs = static_cast<int>(ceil_div(channels, 2));
  launch.pitch = launch.steps * static_cast<int>(row_step) * 2 + 16;  // neighbouring rows are in different banks
  launch.shared_bytes =
      launch.rows * launch.pitch + static_cast<size_t>(stages * slice_steps * panels * row_step_bytes);
  return launch;
}

// The gate in registers, and with the output product behind it.

constexpr int gate_together = 4, gate_parts = 5;  // channels of a load, loads of a lane

/// Whether rows fit in a warp's registers, and each lane can load several channels at once.
inline bool gate_in_registers(const GateForward& p) {
  const int64_t element = p.dtype == DType::float32 ? 4 : 2, bytes = gate_together * element;
  return p.dtype != DType::float64 && p.channels <= gate_parts * gate_together * warp_size &&
         p.channels % gate_together == 0 && rows_aligned(bytes, p.y, p.channels, element) &&
         rows_aligned(bytes, p.z, p.z_row, element) && rows_aligned(bytes, p.output, p.channels, element) &&
         rows_aligned(16, p.weight, 0, 4) && rows_aligned(16, p.bias, 0, 4);
}

constexpr int gate_product_blocks = 5;     // of 16 outputs of a warp
constexpr int gate_product_most_down = 2;  // warps below each other
constexpr int gate_product_most_identity = 64;

/// Steps of 16 inputs in a slice, so that slices have the same bytes for any number of warps beside each other.
template <int across>
constexpr int gate_product_slice_steps = 4 / across;

/// Loads of a lane of a row of the gate, which has about twice as many channels as there are outputs.
template <int across>
constexpr int gate_product_parts = across == 2 ? 3 : gate_parts;

/// The launch, or one that does not exist where the kernel cannot compute this or two launches are faster. `always`:
/// wherever the kernel can run.
inline RowTileLaunch gate_product_launch(const GateProduct& p, size_t shared_limit, bool always = false) {
  const GateForward& gate = p.gate;
  const bool pairs = p.out_channels % 2 == 0 && rows_aligned(4, p.output, p.output_row, 2);
  if (!gate_in_registers(gate) || gate.dtype == DType::float32 || !pairs || gate.rows < 1 ||
      p.out_channels > 4 * gate_product_blocks * row_step || p.identity_channels > gate_product_most_identity)
    return {};
  const bool narrow = p.out_channels <= 2 * gate_product_blocks * row_step &&
                      gate.channels <= gate_product_parts<2> * gate_together * warp_size;
  const int across = narrow ? 2 : 4, panels = across * gate_product_blocks / 2;
  const int slice_steps = narrow ? gate_product_slice_steps<2> : gate_product_slice_steps<4>;
  for (int down = gate_product_most_down; down > 0; --down) {
    const RowTileLaunch launch =
        row_tile_launch(gate.rows, gate.channels, p.out_channels, across, down, slice_steps, panels);
    if (launch.shared_bytes <= shared_limit && launch.tasks >= row_tiles_wanted(down, always)) return launch;
  }
  return {};
}

// The depthwise convolution before the scan, and the product of its outputs.

constexpr int conv_product_together = 4;  // channels of a lane
constexpr int conv_product_across = 4, conv_product_most_down = 2, conv_product_slice_steps = 4;

/// The launch, or one that does not exist where the kernel cannot compute this or two launches are faster. `always`:
/// wherever the kernel can run.
inline RowTileLaunch conv_product_launch(const ConvProduct& p, size_t shared_limit, bool always = false) {
  const bool aligned = p.channels % conv_product_together == 0 && rows_aligned(8, p.input, p.input_row, 2) &&
                       rows_aligned(8, p.activated, p.channels, 2) && rows_aligned(16, p.conv_weight, p.channels, 4) &&
                       rows_aligned(16, p.conv_bias, 0, 4) && rows_aligned(4, p.output, p.out_channels, 2);
  constexpr int64_t most_outputs = conv_product_across * row_step, most = 1 << 15;  // an int counts a line's elements
  const bool sizes = p.out_channels <= most_outputs && p.width <= most && p.height <= most && p.rows() > 0;
  if (!aligned || !sizes || p.input_row > most || (p.dtype != DType::float16 && p.dtype != DType::bfloat16)) return {};
  for (int down = conv_product_most_down; down > 0; --down) {
    const RowTileLaunch launch = row_tile_launch(p.rows(), p.channels, p.out_channels, conv_product_across, down,
                                                 conv_product_slice_steps, conv_product_across / 2);
    if (launch.shared_bytes <= shared_limit && launch.tasks >= row_tiles_wanted(down, always)) return launch;
  }
  return {};
}

}  // namespace mobilemamba::cuda
