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

}  // namespace

cudaError_t haar_forward(const HaarForward& p, size_t shared_limit, cudaStream_t stream) {
  return plane_forward<HaarOp, false>(p, shared_limit, stream);
}

int64_t haar_backward_weight_slabs(const HaarSizes& p, size_t shared_limit) {
  return plane_slabs(PlaneSizes(p), shared_limit);
}

cudaError_t haar_backward_weight(const HaarBackwardWeight& p, size_t shared_limit, cudaStream_t stream) {
  return plane_backward_weight<HaarOp, false>(p, shared_limit, stream);
}

}  // namespace mobilemamba::cuda
