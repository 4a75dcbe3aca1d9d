// The depthwise convolution on CUDA. Two of its kernels are in plane.cuh.
#include "cuda/plane.cuh"

namespace mobilemamba::cuda {
namespace {

template <typename T>
struct DepthwiseOp {
  using Acc = typename AccumulateOf<T>::type;
  using Source = PixelPlane<T>;
  using Forward = DepthwiseForward;
  using BackwardWeight = DepthwiseBackwardWeight;
  static constexpr int planes = 1;
  static constexpr bool has_bias = true;

  __device__ static int64_t plane_height(const DepthwiseSizes& p) { return p.height; }
  __device__ static int64_t out_height(const DepthwiseSizes& p) { return p.out_height(); }
  __device__ static int64_t out_width(const DepthwiseSizes& p) { return p.out_width(); }
  __device__ static int64_t grad_height(const DepthwiseSizes& p) { return p.out_height(); }
  __device__ static int64_t grad_width(const DepthwiseSizes& p) { return p.out_width(); }
  __device__ static int64_t stride(const DepthwiseSizes& p) { return p.stride; }

  /// Forward: adds the bias, applies the activation, adds the residual, then scales and shifts. Backward (`grad_output`
  /// has data): the gradient with respect to the activation's input.
  __device__ static void store(const DepthwiseForward& p, int64_t batch, int64_t channel, int64_t y, int64_t x,
                               const Acc (&sum)[1]) {
    const auto at = [&](const Image& image) {
      return widen(static_cast<const T*>(image.data)[batch * image.batch + y * image.row + x * image.column + channel]);
    };
    Acc value = sum[0];
    if (p.bias) value += static_cast<const Acc*>(p.bias)[channel];
    if (p.grad_output.data)
      value = at(p.grad_output) * activate_derivative(p.activation, value);
    else
      value = activate(p.activation, value) + (p.residual.data ? at(p.residual) : Acc(0));
    if (p.scale)
      value =
          max(static_cast<const Acc*>(p.scale)[channel] * value + static_cast<const Acc*>(p.shift)[channel], Acc(0));
    static_cast<T*>(p.output)[((batch * p.out_height() + y) * p.out_width() + x) * p.output_column + channel] =
        narrow<T>(value);
  }
};

/// Each input position gathers from the outputs that it contributes to. A warp takes one position of 32 channels.
template <typename T>
__global__ void __launch_bounds__(plane_max_threads)
    depthwise_backward_input_kernel(const __grid_constant__ DepthwiseBackwardInput p,
                                    const __grid_constant__ Launch launch) {
  using Acc = typename AccumulateOf<T>::type;
  const int64_t positions = p.batch * p.height * p.width, channel_tiles = ceil_div(p.channels, warp_size);
  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const Channel channel(task % channel_tiles, p.channels);
    const int64_t position = task / channel_tiles * blockDim.y + threadIdx.y;
    if (position >= positions || !channel.active) continue;
    const int64_t x = position % p.width, y = position / p.width % p.height, batch = position / p.width / p.height;
    const PixelPlane<T> grad(p.grad_output, p.out_height(), p.out_width(), batch, channel.index);
    const Acc* weight = static_cast<const Acc*>(p.weight) + channel.index;
    Acc sum = Acc(0);
    const int64_t pad = p.kernel / 2;
    for (int64_t ky = (y + pad) % p.stride, from_y = (y + pad) / p.stride; ky < p.kernel; ky += p.stride, --from_y)
      for (int64_t kx = (x + pad) % p.stride, from_x = (x + pad) / p.stride; kx < p.kernel; kx += p.stride, --from_x) {
        Acc g[1];
        grad.load(from_y, from_x, g);
        sum += g[0] * weight[(ky * p.kernel + kx) * p.channels];
      }
    static_cast<T*>(p.grad_input)[position * p.channels + channel.index] = narrow<T>(sum);
  }
}

}  // namespace

cudaError_t depthwise_forward(const DepthwiseForward& p, size_t shared_limit, cudaStream_t stream) {
  return plane_forward<DepthwiseOp, true>(p, shared_limit, stream);
}

cudaError_t depthwise_backward_input(const DepthwiseBackwardInput& p, cudaStream_t stream) {
  constexpr int warps = 8;
  const Launch launch = {ceil_div(p.batch * p.height * p.width, warps) * ceil_div(p.channels, warp_size), warps, 0};
  return for_type(p.dtype, [&]<typename T>() {
    return launch_kernel(depthwise_backward_input_kernel<T>, launch, stream, p, launch);
  });
}

int64_t depthwise_backward_weight_slabs(const DepthwiseSizes& p, size_t shared_limit) {
  return plane_slabs(PlaneSizes(p), shared_limit);
}

cudaError_t depthwise_backward_weight(const DepthwiseBackwardWeight& p, size_t shared_limit, cudaStream_t stream) {
  return plane_backward_weight<DepthwiseOp, true>(p, shared_limit, stream);
}

}  // namespace mobilemamba::cuda
