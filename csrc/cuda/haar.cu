// The Haar convolution on CUDA: a depthwise convolution of the four sub-bands.
#include "cuda/plane.cuh"

namespace mobilemamba::cuda {
namespace {

template <typename T>
struct HaarOp {
  using Acc = typename AccumulateOf<T>::type;
  using Source = HaarPlanes<T>;
  using Forward = HaarForward;
  using BackwardWeight = HaarBackwardWeight;
  static constexpr int planes = 4;
  static constexpr bool has_bias = false;

  __device__ static int64_t plane_height(const HaarSizes& p) { return p.band_height(); }
  __device__ static int64_t out_height(const HaarSizes& p) { return p.band_height(); }
  __device__ static int64_t out_width(const HaarSizes& p) { return p.band_width(); }
  __device__ static int64_t grad_height(const HaarSizes& p) { return p.height; }
  __device__ static int64_t grad_width(const HaarSizes& p) { return p.width; }
  __device__ static int64_t stride(const HaarSizes&) { return 1; }

  /// Stores the inverse transform of one position: four pixels, or fewer at the border of an odd image.
  __device__ static void store(const HaarForward& p, int64_t batch, int64_t channel, int64_t y, int64_t x,
                               const Acc (&band)[4]) {
    const HaarBands<Acc> pixels = haar(band[0], band[1], band[2], band[3]);
    T* out = static_cast<T*>(p.output) + batch * p.height * p.width * p.output_column + channel;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = 2 * y + i / 2, column = 2 * x + i % 2;
      if (row < p.height && column < p.width)
        out[(row * p.width + column) * p.output_column] = narrow<T>(pixels.band[i]);
    }
  }
};

/// Calls run<T, kernel_size>(); the kernel size is 0 for a size without a kernel of its own.
template <typename Run>
cudaError_t for_type_and_size(const PlaneSizes& p, Run run) {
  return for_type(p.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) < 8) {
      if (p.kernel == 3) return run.template operator()<T, 3>();
      if (p.kernel == 5) return run.template operator()<T, 5>();
      if (p.kernel == 7) return run.template operator()<T, 7>();
    }
    return run.template operator()<T, 0>();
  });
}

}  // namespace

cudaError_t haar_forward(const HaarForward& p, size_t shared_limit, cudaStream_t stream) {
  const PlaneSizes sizes(p);
  const PlaneLaunch launch = plane_launch(sizes, false, shared_limit);
  return for_type_and_size(sizes, [&]<typename T, int kernel_size>() {
    return launch_kernel(plane_forward_kernel<HaarOp<T>, kernel_size>, launch, stream, p, launch);
  });
}

int64_t haar_backward_weight_slabs(const HaarSizes& p, size_t shared_limit) {
  return plane_slabs(PlaneSizes(p), shared_limit);
}

cudaError_t haar_backward_weight(const HaarBackwardWeight& p, size_t shared_limit, cudaStream_t stream) {
  const PlaneSizes sizes(p);
  PlaneLaunch launch = plane_launch(sizes, true, shared_limit);
  launch.tasks = launch.channel_tiles * p.slabs;
  return for_type_and_size(sizes, [&]<typename T, int kernel_size>() {
    return launch_kernel(plane_backward_weight_kernel<HaarOp<T>, kernel_size>, launch, stream, p, launch);
  });
}

}  // namespace mobilemamba::cuda
