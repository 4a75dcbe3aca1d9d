// The launch configurations, callable from Python; see tests/test_launch.py. Torch-free, and no part of the host
// library.
#include "cuda/launch.h"

using namespace mobilemamba;
using namespace mobilemamba::cuda;

namespace {

ScanForward scan_sizes(int64_t float64, int64_t batch, int64_t channels, int64_t length, int64_t state) {
  ScanForward p{};
  p.dtype = float64 ? DType::float64 : DType::float32;
  p.batch = batch;
  p.channels = channels;
  p.length = length;
  p.state = state;
  return p;
}

}  // namespace

extern "C" {

/// out: tasks, warps, shared bytes, segments, tiles, positions of a chunk, scratch bytes, warps at most
__attribute__((visibility("default"))) void scan(int64_t backward, int64_t float64, int64_t batch, int64_t channels,
                                                 int64_t length, int64_t state, int64_t* out) {
  const ScanForward p = scan_sizes(float64, batch, channels, length, state);
  const ScanLaunch launch = backward ? scan_backward_launch(p) : scan_forward_launch(p);
  const ScanShape shape = backward ? scan_backward_shape(float64) : scan_forward_shape(float64);
  const int64_t results[] = {
      launch.tasks,
      launch.warps,
      static_cast<int64_t>(launch.shared_bytes),
      launch.segments,
      launch.tiles,
      shape.chunk_length,
      static_cast<int64_t>(scan_scratch_bytes(p, launch, backward ? 3 : 2)),
      shape.max_warps,
  };
  std::memcpy(out, results, sizeof results);
}

/// out: tasks, warps, shared bytes, tiles in y and x, tile height and width, stage height and width, staged, slabs
__attribute__((visibility("default"))) void plane(int64_t haar, int64_t backward, int64_t float64, int64_t batch,
                                                  int64_t channels, int64_t height, int64_t width, int64_t kernel,
                                                  int64_t stride, int64_t shared_limit, int64_t* out) {
  const DType type = float64 ? DType::float64 : DType::float32;
  const PlaneSizes sizes = haar ? PlaneSizes(HaarSizes{type, batch, channels, height, width, kernel})
                                : PlaneSizes(DepthwiseSizes{type, batch, channels, height, width, kernel, stride});
  const PlaneLaunch launch = plane_launch(sizes, backward, shared_limit);
  const int64_t results[] = {
      launch.tasks,
      launch.warps,
      static_cast<int64_t>(launch.shared_bytes),
      launch.tiles_y,
      launch.tiles_x,
      launch.tile_height,
      launch.tile_width,
      launch.stage_height,
      launch.stage_width,
      sizes.staged(),
      plane_slabs(sizes, shared_limit),
  };
  std::memcpy(out, results, sizeof results);
}

}  // extern "C"
