// The launch configuration of every kernel, as a function of the sizes alone. Needs no CUDA headers: tests/launches.cpp
// makes a Python module of these functions, for tests/test_launch.py.
//
// Every grid is one-dimensional and its blocks loop over tasks, so that no size exceeds the limits of a grid.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/depthwise.h"
#include "kernels/haar.h"
#include "kernels/packed_conv.h"
#include "kernels/scan.h"

namespace mobilemamba::cuda {

constexpr int warp_size = 32;

inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}
inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

struct Launch {
  int64_t tasks;
  int warps;  // of a block
  size_t shared_bytes;
};

// The scan. A thread holds a chunk of successive positions of one channel in registers, a warp the same chunk of 32
// channels, a block several successive chunks: a segment. A sequence of one segment is read once. With more segments, a
// collect pass reads the sequence first to compute the decay and the last state of each.

constexpr int staged_rows = 16;     // rows of delta, or of B and C, that a warp stages in shared memory at a time
constexpr int staged_pitch = 12;    // elements from row to row: fewer lanes meet in one bank than with 8
constexpr int parameter_batch = 4;  // gradients of parameters that one pair of barriers sums over the warps

/// Positions of a chunk and the most chunks of a block. A multiprocessor's registers (256 KiB) hold one such block.
struct ScanShape {
  int chunk_length, max_warps;
};
constexpr ScanShape scan_forward_shape(bool float64) {
  return float64 ? ScanShape{8, 16} : ScanShape{8, 32};
}
constexpr ScanShape scan_backward_shape(bool float64) {
  return float64 ? ScanShape{8, 8} : ScanShape{8, 16};
}

struct ScanLaunch : Launch {
  int64_t segments, tiles;  // of the sequence, of the channels
  bool together;            // whether a warp stages all its rows of both directions at once, in one wait for memory
  int staged;               // elements of shared memory for the rows of a warp
};

/// `numbers`: elements of shared memory that each warp needs besides its staged rows.
inline ScanLaunch scan_launch(const ScanForward& p, ScanShape shape, int numbers) {
  ScanLaunch launch;
  const int64_t chunks = ceil_div(p.length, shape.chunk_length);
  // Splits the sequence into segments of about equal length. With more than one segment each has at least two warps:
  // the collect pass of the backward kernel reduces in two of them.
  launch.warps = static_cast<int>(ceil_div(chunks, ceil_div(chunks, shape.max_warps)));
  launch.segments = ceil_div(chunks, launch.warps);
  launch.tiles = ceil_div(p.channels, warp_size);
  launch.tasks = p.batch * launch.segments * launch.tiles;
  constexpr int64_t most_bytes = 64 * 1024;  // what a block can have on every GPU
  const auto bytes = [&](int64_t rows) {
    return launch.warps * (rows * staged_pitch + numbers) * accumulate_bytes(p.dtype);
  };
  launch.together = bytes(2 * p.rows()) <= most_bytes;
  launch.staged = staged_pitch * static_cast<int>(launch.together ? 2 * p.rows() : staged_rows);
  launch.shared_bytes = bytes(launch.staged / staged_pitch);
  return launch;
}

/// Shared memory of a warp: decay and state of its chunk, in two buffers.
inline ScanLaunch scan_forward_launch(const ScanForward& p) {
  return scan_launch(p, scan_forward_shape(p.dtype == DType::float64), 4 * warp_size);
}

/// Shared memory of a warp: u and grad_y; decay, state and the state's gradient of its chunk; parameter gradients.
inline ScanLaunch scan_backward_launch(const ScanForward& p) {
  const ScanShape shape = scan_backward_shape(p.dtype == DType::float64);
  return scan_launch(p, shape, (2 * shape.chunk_length + 3 + parameter_batch) * warp_size);
}

/// Scratch memory: for each segment, direction, state and channel the decay, the state, and backward its gradient.
inline size_t scan_scratch_bytes(const ScanForward& p, const ScanLaunch& launch, int values) {
  if (launch.segments == 1) return 0;
  return p.batch * launch.segments * 2 * p.state * values * p.channels * accumulate_bytes(p.dtype);
}

// Convolutions of planes: an image, or the four sub-bands of its Haar transform. A block computes a tile of positions
// for 32 channels. With 16- or 32-bit elements and a kernel of 3, 5 or 7 it stages the tile's input in shared memory.

constexpr int strip_height = 2, strip_width = 4;  // outputs of a thread
constexpr size_t stage_budget = 99 * 1024;        // bytes of shared memory: two blocks fit the 227 KiB of sm_90

struct PlaneLaunch : Launch {
  int64_t tiles_y, tiles_x, channel_tiles;
  int tile_height, tile_width;    // in outputs
  int stage_height, stage_width;  // in inputs

  MOBILEMAMBA_HOST_DEVICE int64_t position_tiles(int64_t batch) const { return batch * tiles_y * tiles_x; }
};

struct PlaneSizes {
  DType dtype;
  int planes;
  int64_t batch, channels, height, width, kernel, stride;

  explicit PlaneSizes(const DepthwiseSizes& p)
      : dtype(p.dtype),
        planes(1),
        batch(p.batch),
        channels(p.channels),
        height(p.height),
        width(p.width),
        kernel(p.kernel),
        stride(p.stride) {}
  explicit PlaneSizes(const HaarSizes& p)
      : dtype(p.dtype),
        planes(4),
        batch(p.batch),
        channels(p.channels),
        height(p.band_height()),
        width(p.band_width()),
        kernel(p.kernel),
        stride(1) {}

  int64_t out_height() const { return ceil_div(height, stride); }
  int64_t out_width() const { return ceil_div(width, stride); }
  /// Whether this size has a kernel that stages its input.
  bool staged() const {
    const bool size = kernel == 3 || (stride == 1 && (kernel == 5 || kernel == 7));
    return size && stride <= 2 && dtype != DType::float64;
  }
};

/// `backward`: for the gradient of the weight. `shared_limit`: bytes of shared memory that a block may have.
inline PlaneLaunch plane_launch(const PlaneSizes& p, bool backward, size_t shared_limit) {
  const size_t budget = shared_limit < stage_budget ? shared_limit : stage_budget;
  PlaneLaunch launch;
  launch.tile_height = static_cast<int>(clamp(round_up(p.out_height(), strip_height), strip_height, 8));
  launch.tile_width = static_cast<int>(clamp(round_up(p.out_width(), strip_width), strip_width, backward ? 8 : 16));
  for (;;) {
    const int64_t height = (launch.tile_height - 1) * p.stride + p.kernel;
    launch.stage_height = static_cast<int>(height < p.height ? height : p.height);  // no rows outside the plane
    launch.stage_width = static_cast<int>((launch.tile_width - 1) * p.stride + p.kernel);
    int64_t numbers = p.planes * launch.stage_height * launch.stage_width;
    const int64_t sums = p.planes * p.kernel * p.kernel + 1;  // the warps' sums reuse the memory
    if (backward && numbers < sums) numbers = sums;
    launch.shared_bytes = p.staged() ? numbers * warp_size * sizeof(float) : 0;
    if (launch.shared_bytes <= budget) break;
    if (launch.tile_width > 2 * strip_width)
      launch.tile_width = 2 * strip_width;
    else
      launch.tile_height -= strip_height;  // a height of 2 always fits
  }
  launch.tiles_y = ceil_div(p.out_height(), launch.tile_height);
  launch.tiles_x = ceil_div(p.out_width(), launch.tile_width);
  launch.channel_tiles = ceil_div(p.channels, warp_size);
  launch.tasks = launch.position_tiles(p.batch) * launch.channel_tiles;
  const int64_t strips = launch.tile_height / strip_height * (launch.tile_width / strip_width);
  launch.warps = backward ? 8 : static_cast<int>(clamp(strips, 4, 8));
  return launch;
}

/// The number of slabs: parts of the batch's tiles, each with its own partial sums of the weight's gradient. About 1024
/// blocks fill a large GPU. A slab has about 4 tiles or more, because its sums are written and read again.
inline int64_t plane_slabs(const PlaneSizes& p, size_t shared_limit) {
  const PlaneLaunch launch = plane_launch(p, true, shared_limit);
  return clamp(1024 / launch.channel_tiles, 1, ceil_div(launch.position_tiles(p.batch), 4));
}

// The depthwise convolution with a kernel of its own. A thread computes strips of outputs; its channels are the same in
// all of them, so that it reads the weight once.

constexpr int depthwise_threads = 128;  // of a block
constexpr int strip_columns = 4;        // outputs of a strip

struct DepthwiseLaunch : Launch {
  int rows;  // of a strip
  int64_t strips_y, strips_x, strips;
};

/// The most channels of a thread: 8 bytes, and fewer where the weights of more would not fit in registers.
constexpr int depthwise_channels(size_t element_bytes, int64_t kernel) {
  return kernel == 3 ? static_cast<int>(8 / element_bytes) : kernel == 5 ? 2 : 1;
}

/// `channels`: of a thread.
inline DepthwiseLaunch depthwise_launch(const DepthwiseSizes& p, int channels) {
  // Long strips read fewer rows twice; many strips keep a large GPU busy.
  constexpr int64_t enough = 1 << 16, most_blocks = 16 * 132;
  DepthwiseLaunch launch;
  launch.warps = depthwise_threads / warp_size;
  launch.shared_bytes = 0;
  launch.strips_x = ceil_div(p.out_width(), strip_columns);
  const int64_t groups = p.channels / channels;
  for (int64_t most = 8;; most /= 2) {
    launch.strips_y = ceil_div(p.out_height(), most);
    launch.rows = static_cast<int>(ceil_div(p.out_height(), launch.strips_y));
    launch.strips = p.batch * launch.strips_y * launch.strips_x;
    if (most == 1 || launch.strips * groups >= enough) break;
  }
  // At least one thread for each group of channels.
  launch.tasks = clamp(ceil_div(launch.strips * groups, depthwise_threads), 1, most_blocks);
  const int64_t least = ceil_div(groups, depthwise_threads);
  if (launch.tasks < least) launch.tasks = least;
  return launch;
}

/// For the gradient of the input with stride 2: strips of two rows, which as many strips of outputs contribute to.
inline DepthwiseLaunch depthwise_backward_input_launch(const DepthwiseSizes& p, int channels) {
  DepthwiseLaunch launch = depthwise_launch(p, channels);
  launch.rows = 1;
  launch.strips_y = p.out_height();
  launch.strips = p.batch * launch.strips_y * launch.strips_x;
  const int64_t groups = p.channels / channels, least = ceil_div(groups, depthwise_threads);
  launch.tasks = clamp(ceil_div(launch.strips * groups, depthwise_threads), 1, 16 * 132);
  if (launch.tasks < least) launch.tasks = least;
  return launch;
}

/// For the gradient of the weight: long strips, because a strip begins with rows that it reads twice.
inline DepthwiseLaunch depthwise_backward_weight_launch(const DepthwiseSizes& p, int64_t slabs, int channels) {
  constexpr int64_t most_rows = 16;
  DepthwiseLaunch launch;
  launch.warps = depthwise_threads / warp_size;
  launch.strips_x = ceil_div(p.out_width(), strip_columns);
  launch.strips_y = ceil_div(p.out_height(), most_rows);
  launch.rows = static_cast<int>(ceil_div(p.out_height(), launch.strips_y));
  launch.strips = p.batch * launch.strips_y * launch.strips_x;
  launch.tasks = slabs * ceil_div(p.channels, warp_size * channels);
  launch.shared_bytes = (p.kernel * p.kernel + 1) * warp_size * channels * sizeof(float);
  return launch;
}

/// The number of slabs: about 8 blocks for each multiprocessor of a large GPU, and at least two strips for each warp.
inline int64_t depthwise_slabs(const DepthwiseSizes& p) {
  const int channels = depthwise_channels(p.dtype == DType::float32 ? 4 : 2, p.kernel);
  const DepthwiseLaunch one = depthwise_backward_weight_launch(p, 1, channels);
  return clamp(8 * 132 / one.tasks, 1, ceil_div(one.strips, 2 * one.warps));
}

// The product of patches and packed weight. A block computes a tile of the output.

constexpr int product_stages = 4;  // slices of the inputs in shared memory

/// Tiles of 128 x 128, 128 x 64, 128 x 32 and 32 x 32 rows and columns; or parts of the output's lines, for patches
/// whose lines fit an instruction.
enum class ProductShape { large, medium, narrow, small, lines };

constexpr int line_conv_kernel_size = 3, line_conv_warps = 4;
constexpr int line_conv_step = 16;                  // outputs of a line that a warp computes at a time
constexpr int line_conv_most_inputs = 16;           // of an instruction
constexpr int line_conv_most_width = 1 << 27;       // elements of a line are counted by an int
constexpr int64_t line_conv_most_blocks = 4 * 132;  // as many as a large GPU runs at a time

/// Whether the lines of patches are runs of memory that fit an instruction, and the outputs one panel.
inline bool has_line_conv(const PackedConvForward& p) {
  return p.kernel == line_conv_kernel_size && p.kernel * p.in_channels <= line_conv_most_inputs && p.panels() == 1 &&
         p.input.column == p.in_channels && p.width < line_conv_most_width && p.stride <= line_conv_step;
}

struct ProductLaunch : Launch {
  ProductShape shape;
  int64_t lines, columns;  // of tiles; or lines of the output, and parts of a line
  int64_t rows, out_height, out_width;
  bool aligned;  // whether each row of the input, and each pixel of a patch, begins at a multiple of 16 bytes
  // Whether the outputs that a thread stores together, 8 in lines and otherwise 2, are aligned; and whether all are and
  // no piece is smaller.
  bool aligned_residual, aligned_second, aligned_output, whole_outputs;
};

inline ProductLaunch product_launch(const PackedConvForward& p) {
  const auto tiles = [&](int64_t rows, int64_t panels) {
    return ceil_div(p.rows(), rows) * ceil_div(p.panels(), panels);
  };
  constexpr int64_t busy = 132;  // blocks that fill a large GPU
  ProductLaunch launch;
  int rows = 128, panels = 1;
  if (has_line_conv(p)) {
    launch.shape = ProductShape::lines, launch.warps = line_conv_warps;
  } else if (!p.in_place() && p.panels() > 2 && tiles(128, 4) >= 2 * busy) {  // gathers each patch fewer times
    launch.shape = ProductShape::large, launch.warps = 8, panels = 4;
  } else if (p.panels() > 1 && tiles(128, 2) >= busy) {
    launch.shape = ProductShape::medium, launch.warps = 4, panels = 2;
  } else if (tiles(128, 1) >= busy) {
    launch.shape = ProductShape::narrow, launch.warps = 4;
  } else {
    launch.shape = ProductShape::small, launch.warps = 2, rows = 32;
  }
  launch.rows = p.rows(), launch.out_height = p.out_height(), launch.out_width = p.out_width();
  launch.columns = ceil_div(p.panels(), panels);
  launch.lines = ceil_div(p.rows(), rows);
  // As many blocks as a large GPU runs at a time, each with 512 / threads others on its multiprocessor.
  launch.tasks = clamp(launch.lines * launch.columns, 1, busy * 16 / launch.warps);
  constexpr int64_t slice_bytes = 64;
  launch.shared_bytes = product_stages * (rows + panels * PackedConvForward::panel) * slice_bytes;
  if (launch.shape == ProductShape::lines) {
    // Whole lines where there are enough of them: each warp begins with loading the weight.
    launch.lines = p.batch * p.out_height();
    launch.columns =
        launch.lines >= line_conv_most_blocks * line_conv_warps ? 1 : ceil_div(p.out_width(), line_conv_step);
    launch.tasks = clamp(ceil_div(launch.lines * launch.columns, line_conv_warps), 1, line_conv_most_blocks);
    launch.shared_bytes = 0;
  }
  const auto at = [](int64_t elements, const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % (elements * 2) == 0 && stride % elements == 0;
  };
  launch.aligned = at(8, p.input.data, p.input.column);
  launch.aligned &= p.in_channels % 8 == 0;
  if (!p.in_place()) launch.aligned &= p.input.row % 8 == 0 && p.input.batch % 8 == 0;
  const int64_t piece = launch.shape == ProductShape::lines ? 8 : 2;
  launch.aligned_residual = at(piece, p.residual, p.residual_row);
  launch.aligned_second = at(piece, p.second_residual, p.second_residual_row);
  launch.aligned_output = at(piece, p.output, p.output_row);
  launch.whole_outputs =
      p.out_channels % piece == 0 && launch.aligned_residual && launch.aligned_second && launch.aligned_output;
  return launch;
}

}  // namespace mobilemamba::cuda
