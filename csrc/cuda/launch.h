// The launch configuration of every kernel, as a function of the sizes alone. Needs no CUDA headers: a library without
// CUDA kernels has these functions too, for mobilemamba._C and its tests.
//
// Every grid is one-dimensional and its blocks loop over tasks, so that no size exceeds the limits of a grid.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/depthwise.h"
#include "kernels/haar.h"
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
  launch.shared_bytes = launch.warps * (staged_rows * shape.chunk_length + numbers) * accumulate_bytes(p.dtype);
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

}  // namespace mobilemamba::cuda
