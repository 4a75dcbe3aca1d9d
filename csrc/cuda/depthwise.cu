// The depthwise convolution on CUDA. The gradient of its weight, and kernels of unusual sizes, are in plane.cuh.
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

// Forward ------------------------------------------------------------------------------------------------------------

/// Whether the elements of `count` channels can be loaded together.
struct Together {
  int count, element_bytes;

  bool image(const Image& x) const {
    return reinterpret_cast<uintptr_t>(x.data) % (element_bytes * count) == 0 &&
           (!x.data || (x.batch % count == 0 && x.row % count == 0 && x.column % count == 0));
  }
  bool image(const void* data, int64_t column) const { return image({data, column, column, column}); }
  bool parameter(const void* x) const { return reinterpret_cast<uintptr_t>(x) % (sizeof(float) * count) == 0; }
};

bool fits(const Together& t, const DepthwiseForward& p) {
  return t.image(p.input) && t.image(p.residual) && t.image(p.grad_output) && t.image(p.output, p.output_column) &&
         t.parameter(p.weight) && t.parameter(p.bias) && t.parameter(p.scale) && t.parameter(p.shift);
}
bool fits(const Together& t, const DepthwiseBackwardInput& p) {
  return t.image(p.grad_output) && t.image(p.grad_input, p.channels) && t.parameter(p.weight);
}
bool fits(const Together& t, const DepthwiseBackwardWeight& p) {
  return t.image(p.grad_output) && t.image(p.input) && t.parameter(p.sums);
}

/// Calls run<count>() with the most channels, up to `most`, that a thread can load together.
template <int most, typename P, typename Run>
cudaError_t for_channels_together(const P& p, Run run) {
  if constexpr (most > 1)
    if (p.channels % most != 0 || !fits({most, p.dtype == DType::float32 ? 4 : 2}, p))
      return for_channels_together<most / 2>(p, run);
  return run.template operator()<most>();
}

/// Calls run<T, kernel_size, stride, count>() for sizes that have kernels of their own.
template <typename P, typename Run>
cudaError_t for_strips(const P& p, Run run) {
  const auto with = [&]<typename T, int kernel_size, int stride>() {
    return for_channels_together<depthwise_channels(sizeof(T), kernel_size)>(
        p, [&]<int count>() { return run.template operator()<T, kernel_size, stride, count>(); });
  };
  return for_type(p.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) < 8) {
      if (p.stride == 2) return with.template operator()<T, 3, 2>();
      if (p.kernel == 3) return with.template operator()<T, 3, 1>();
      if (p.kernel == 5) return with.template operator()<T, 5, 1>();
      if (p.kernel == 7) return with.template operator()<T, 7, 1>();
    }
    return cudaErrorInvalidValue;
  });
}

/// Of a parameter (..., C) in float32.
template <int count>
__device__ __forceinline__ Channels<float, count> parameter(const void* from, int64_t at) {
  return load_channels<float, count>(static_cast<const float*>(from) + at);
}

/// Loads pixels from column `left` of a row on, which may be up to `pad` columns before the row of `width` pixels. Zero
/// beyond the row.
template <typename T, int count, int columns, int pad>
__device__ __forceinline__ void load_row(const T* from, int64_t column, int left, int64_t width,
                                         Channels<T, count> (&to)[columns]) {
  const int end = static_cast<int>(width) - left;
#pragma unroll
  for (int i = 0; i < columns; ++i, from += column) {
    to[i] = {};
    if ((i >= pad || i >= -left) && i < end) to[i] = load_channels<T, count>(from);
  }
}

/// The epilogue of a strip's row, the same as that of DepthwiseOp::store. A thread keeps its channels' bias.
template <typename T, int count>
class Finish {
 public:
  __device__ Finish(const DepthwiseForward& p, int64_t channel) : p_(p), channel_(channel) {
    if (p.bias) bias_ = parameter<count>(p.bias, channel);
  }

  /// Stores `columns` outputs from row `y` and column `x` of an image on.
  __device__ __forceinline__ void store(int64_t batch, int y, int x, int columns,
                                        const float (&sum)[strip_columns][count]) const {
    float value[strip_columns * count];
#pragma unroll
    for (int i = 0; i < strip_columns * count; ++i)
      value[i] = sum[i / count][i % count] + bias_.value[i % count];
    if (p_.grad_output.data) {
      float grad[strip_columns * count] = {};
      add(p_.grad_output, batch, y, x, columns, grad);
      differentiate_all<T>(p_.activation, grad, value);
    } else {
      activate_all<T>(p_.activation, value);
      if (p_.residual.data) add(p_.residual, batch, y, x, columns, value);
    }
    if (p_.scale) {
      const Channels<float, count> scale = parameter<count>(p_.scale, channel_);
      const Channels<float, count> shift = parameter<count>(p_.shift, channel_);
#pragma unroll
      for (int i = 0; i < strip_columns * count; ++i)
        value[i] = max(scale.value[i % count] * value[i] + shift.value[i % count], 0.0f);
    }
    T* to =
        static_cast<T*>(p_.output) + ((batch * p_.out_height() + y) * p_.out_width() + x) * p_.output_column + channel_;
#pragma unroll
    for (int column = 0; column < strip_columns; ++column, to += p_.output_column) {
      Channels<T, count> elements;
#pragma unroll
      for (int i = 0; i < count; ++i)
        elements.value[i] = narrow<T>(value[column * count + i]);
      if (column < columns) store_channels(to, elements);
    }
  }

 private:
  __device__ __forceinline__ void add(const Image& image, int64_t batch, int y, int x, int columns,
                                      float (&value)[strip_columns * count]) const {
    const T* from =
        static_cast<const T*>(image.data) + batch * image.batch + y * image.row + x * image.column + channel_;
#pragma unroll
    for (int column = 0; column < strip_columns; ++column, from += image.column) {
      if (column >= columns) continue;
      const Channels<T, count> elements = load_channels<T, count>(from);
#pragma unroll
      for (int i = 0; i < count; ++i)
        value[column * count + i] += widen(elements.value[i]);
    }
  }

  const DepthwiseForward& p_;
  const int64_t channel_;
  Channels<float, count> bias_ = {};
};

/// A thread computes strips of `strip_columns` outputs by `launch.rows`, for `count` channels. It reads each row of the
/// input once: a row contributes to several rows of outputs, whose sums are in registers.
template <typename T, int kernel_size, int stride, int count>
__global__ void __launch_bounds__(depthwise_threads)
    depthwise_strip_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ DepthwiseLaunch launch) {
  constexpr int pad = kernel_size / 2, columns = (strip_columns - 1) * stride + kernel_size;
  constexpr int open = (kernel_size + stride - 1) / stride;  // rows of outputs that an input row can contribute to
  const int64_t groups = p.channels / count, threads = int64_t(gridDim.x) * depthwise_threads / groups * groups;
  const int64_t thread = int64_t(blockIdx.x) * depthwise_threads + threadIdx.y * warp_size + threadIdx.x;
  if (thread >= threads) return;
  const int64_t channel = thread % groups * count;
  const Finish<T, count> finish(p, channel);
  float weight[kernel_size * kernel_size][count];
#pragma unroll
  for (int tap = 0; tap < kernel_size * kernel_size; ++tap) {
    const Channels<float, count> w = parameter<count>(p.weight, tap * p.channels + channel);
#pragma unroll
    for (int i = 0; i < count; ++i)
      weight[tap][i] = w.value[i];
  }
  const int height = static_cast<int>(p.out_height()), width = static_cast<int>(p.out_width());
  for (int64_t strip = thread / groups; strip < launch.strips; strip += threads / groups) {
    const int64_t across = strip / launch.strips_x, batch = across / launch.strips_y;
    const int x = static_cast<int>(strip - across * launch.strips_x) * strip_columns;
    const int y = static_cast<int>(across - batch * launch.strips_y) * launch.rows;
    const int rows = height - y < launch.rows ? height - y : launch.rows, left = x * stride - pad;
    int row = y * stride - pad;  // of the input
    const T* from = static_cast<const T*>(p.input.data) + batch * p.input.batch + row * p.input.row +
                    left * p.input.column + channel;
    Channels<T, count> next[columns];
    const auto load = [&] {
      load_row<T, count, columns, pad>(from, p.input.column, left, row >= 0 && row < p.height ? p.width : 0, next);
      from += p.input.row;
      ++row;
    };
    load();
    float sum[open][strip_columns][count] = {};
    for (int step = 0; step < rows + open - 1; ++step) {
#pragma unroll
      for (int j = 0; j < stride; ++j) {
        float in[columns][count];
#pragma unroll
        for (int i = 0; i < columns; ++i)
#pragma unroll
          for (int c = 0; c < count; ++c)
            in[i][c] = widen(next[i].value[c]);
        load();  // while this row is used
#pragma unroll
        for (int i = 0; i < open; ++i) {
          const int ky = j + i * stride;
          if (ky >= kernel_size || step < i || step - i >= rows) continue;  // no row of this strip
#pragma unroll
          for (int kx = 0; kx < kernel_size; ++kx)
#pragma unroll
            for (int column = 0; column < strip_columns; ++column)
#pragma unroll
              for (int c = 0; c < count; ++c)
                sum[open - 1 - i][column][c] += weight[ky * kernel_size + kx][c] * in[column * stride + kx][c];
        }
      }
      if (step >= open - 1) finish.store(batch, y + step - (open - 1), x, width - x, sum[0]);
#pragma unroll
      for (int i = 0; i < open; ++i)
#pragma unroll
        for (int column = 0; column < strip_columns; ++column)
#pragma unroll
          for (int c = 0; c < count; ++c)
            sum[i][column][c] = i + 1 < open ? sum[i + 1 < open ? i + 1 : i][column][c] : 0.0f;
    }
  }
}

// Backward -----------------------------------------------------------------------------------------------------------

/// The gradient of the input for a kernel of 3 and stride 2. A thread computes two rows of 8 positions, which two rows
/// of 5 outputs contribute to.
template <typename T, int count>
__global__ void __launch_bounds__(depthwise_threads)
    depthwise_backward_strip_kernel(const __grid_constant__ DepthwiseBackwardInput p,
                                    const __grid_constant__ DepthwiseLaunch launch) {
  const int64_t groups = p.channels / count, threads = int64_t(gridDim.x) * depthwise_threads / groups * groups;
  const int64_t thread = int64_t(blockIdx.x) * depthwise_threads + threadIdx.y * warp_size + threadIdx.x;
  if (thread >= threads) return;
  const int64_t channel = thread % groups * count;
  Channels<float, count> weight[3][3];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap)
    weight[tap / 3][tap % 3] = parameter<count>(p.weight, tap * p.channels + channel);
  for (int64_t strip = thread / groups; strip < launch.strips; strip += threads / groups) {
    const int64_t across = strip / launch.strips_x, batch = across / launch.strips_y;
    const int64_t x = (strip - across * launch.strips_x) * strip_columns, y = across - batch * launch.strips_y;
    float grad[2][strip_columns + 1][count];
#pragma unroll
    for (int down = 0; down < 2; ++down)
#pragma unroll
      for (int i = 0; i <= strip_columns; ++i) {
        Channels<T, count> loaded = {};
        if (y + down < p.out_height() && x + i < p.out_width())
          loaded = load_channels<T, count>(static_cast<const T*>(p.grad_output.data) + batch * p.grad_output.batch +
                                           (y + down) * p.grad_output.row + (x + i) * p.grad_output.column + channel);
#pragma unroll
        for (int c = 0; c < count; ++c)
          grad[down][i][c] = widen(loaded.value[c]);
      }
#pragma unroll
    for (int down = 0; down < 2; ++down) {
      if (2 * y + down >= p.height) continue;
      T* to =
          static_cast<T*>(p.grad_input) + ((batch * p.height + 2 * y + down) * p.width + 2 * x) * p.channels + channel;
#pragma unroll
      for (int i = 0; i < 2 * strip_columns; ++i, to += p.channels) {
        if (2 * x + i >= p.width) continue;
        Channels<T, count> stored;
#pragma unroll
        for (int c = 0; c < count; ++c) {
          float sum = 0.0f;
#pragma unroll
          for (int ky = 1 - down; ky < 3; ky += 2)  // 1, or 0 and 2: of the next row and of this one
#pragma unroll
            for (int kx = 1 - i % 2; kx < 3; kx += 2)
              sum += weight[ky][kx].value[c] * grad[ky == 0 ? 1 : 0][i / 2 + (kx == 0 ? 1 : 0)][c];
          stored.value[c] = narrow<T>(sum);
        }
        store_channels(to, stored);
      }
    }
  }
}

/// The gradient of the weight, and of the bias last. A block sums over the strips of one slab for 32 groups of
/// channels, a lane for one group. The warps take the strips in turn and add their sums in a fixed order.
template <typename T, int kernel_size, int stride, int count>
__global__ void __launch_bounds__(depthwise_threads)
    depthwise_backward_weight_kernel(const __grid_constant__ DepthwiseBackwardWeight p,
                                     const __grid_constant__ DepthwiseLaunch launch) {
  constexpr int pad = kernel_size / 2, columns = (strip_columns - 1) * stride + kernel_size;
  constexpr int taps = kernel_size * kernel_size, warps = depthwise_threads / warp_size;
  constexpr int open = (kernel_size + stride - 1) / stride;  // rows of outputs that an input row contributes to
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int height = static_cast<int>(p.out_height()), width = static_cast<int>(p.out_width());
  const int64_t tiles = ceil_div(p.channels, warp_size * count);
  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const int64_t slab = task / tiles, channel = (task % tiles * warp_size + lane) * count;
    const bool active = channel < p.channels;
    const int64_t end = active ? launch.strips * (slab + 1) / p.slabs : 0;
    float sum[taps + 1][count] = {};
    for (int64_t strip = launch.strips * slab / p.slabs + warp; strip < end; strip += warps) {
      const int64_t across = strip / launch.strips_x, batch = across / launch.strips_y;
      const int x = static_cast<int>(strip - across * launch.strips_x) * strip_columns;
      const int y = static_cast<int>(across - batch * launch.strips_y) * launch.rows;
      const int rows = height - y < launch.rows ? height - y : launch.rows, left = x * stride - pad;
      const T* grads = static_cast<const T*>(p.grad_output.data) + batch * p.grad_output.batch + y * p.grad_output.row +
                       x * p.grad_output.column + channel;
      int row = y * stride - pad;  // of the input
      const T* inputs = static_cast<const T*>(p.input.data) + batch * p.input.batch + row * p.input.row +
                        left * p.input.column + channel;
      float grad[open][strip_columns][count] = {};  // the rows of outputs that the current row contributes to
      for (int step = 0; step < rows + open - 1; ++step) {
#pragma unroll
        for (int i = 0; i < strip_columns; ++i) {
          Channels<T, count> loaded = {};
          if (step < rows && x + i < width) loaded = load_channels<T, count>(grads + i * p.grad_output.column);
#pragma unroll
          for (int c = 0; c < count; ++c) {
#pragma unroll
            for (int older = 0; older + 1 < open; ++older)
              grad[older][i][c] = grad[older + 1][i][c];
            grad[open - 1][i][c] = widen(loaded.value[c]);
            sum[taps][c] += grad[open - 1][i][c];
          }
        }
        grads += p.grad_output.row;
#pragma unroll
        for (int j = 0; j < stride; ++j, ++row, inputs += p.input.row) {
          if (row < 0 || row >= p.height) continue;
          Channels<T, count> loaded[columns];
          load_row<T, count, columns, pad>(inputs, p.input.column, left, p.width, loaded);
          float in[columns][count];
#pragma unroll
          for (int i = 0; i < columns; ++i)
#pragma unroll
            for (int c = 0; c < count; ++c)
              in[i][c] = widen(loaded[i].value[c]);
#pragma unroll
          for (int i = 0; i < open; ++i) {
            const int ky = j + i * stride;
            if (ky >= kernel_size || step < i || step - i >= rows) continue;  // no row of this strip
#pragma unroll
            for (int column = 0; column < strip_columns; ++column) {
              if (x + column >= width) continue;  // 0 times an infinite input would be NaN
#pragma unroll
              for (int kx = 0; kx < kernel_size; ++kx)
#pragma unroll
                for (int c = 0; c < count; ++c)
                  sum[ky * kernel_size + kx][c] += grad[open - 1 - i][column][c] * in[column * stride + kx][c];
            }
          }
        }
      }
    }
    float* const shared = reinterpret_cast<float*>(shared_memory) + lane * count;  // (taps + 1, 32 * count)
    for (int turn = 0; turn < warps; ++turn) {
      __syncthreads();
      if (warp != turn) continue;
#pragma unroll
      for (int i = 0; i <= taps; ++i)
#pragma unroll
        for (int c = 0; c < count; ++c) {
          float& to = shared[i * warp_size * count + c];
          to = (turn == 0 ? 0.0f : to) + sum[i][c];
        }
    }
    __syncthreads();
    if (active)
      for (int i = warp; i <= taps; i += warps)
        store_channels(static_cast<float*>(p.sums) + (slab * (taps + 1) + i) * p.channels + channel,
                       load_channels<float, count>(shared + i * warp_size * count));
    __syncthreads();  // all have read the sums
  }
}

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
  if (const PlaneSizes sizes(p); !sizes.staged()) {
    const PlaneLaunch launch = plane_launch(sizes, false, shared_limit);
    return for_type(p.dtype, [&]<typename T>() {
      return launch_kernel(plane_forward_kernel<DepthwiseOp<T>, 0>, launch, stream, p, launch);
    });
  }
  return for_strips(p, [&]<typename T, int kernel_size, int stride, int count>() {
    const DepthwiseLaunch launch = depthwise_launch(p, count);
    return launch_kernel(depthwise_strip_kernel<T, kernel_size, stride, count>, launch, stream, p, launch);
  });
}

cudaError_t depthwise_backward_input(const DepthwiseBackwardInput& p, cudaStream_t stream) {
  if (p.stride == 2 && PlaneSizes(p).staged())
    return for_strips(p, [&]<typename T, int, int, int count>() {
      const DepthwiseLaunch launch = depthwise_backward_input_launch(p, count);
      return launch_kernel(depthwise_backward_strip_kernel<T, count>, launch, stream, p, launch);
    });
  constexpr int warps = 8;
  const Launch launch = {ceil_div(p.batch * p.height * p.width, warps) * ceil_div(p.channels, warp_size), warps, 0};
  return for_type(p.dtype, [&]<typename T>() {
    return launch_kernel(depthwise_backward_input_kernel<T>, launch, stream, p, launch);
  });
}

int64_t depthwise_backward_weight_slabs(const DepthwiseSizes& p, size_t shared_limit) {
  return PlaneSizes(p).staged() ? depthwise_slabs(p) : plane_slabs(PlaneSizes(p), shared_limit);
}

cudaError_t depthwise_backward_weight(const DepthwiseBackwardWeight& p, size_t shared_limit, cudaStream_t stream) {
  if (const PlaneSizes sizes(p); !sizes.staged()) {
    PlaneLaunch launch = plane_launch(sizes, true, shared_limit);
    launch.tasks = launch.channel_tiles * p.slabs;
    return for_type(p.dtype, [&]<typename T>() {
      return launch_kernel(plane_backward_weight_kernel<DepthwiseOp<T>, 0>, launch, stream, p, launch);
    });
  }
  return for_strips(p, [&]<typename T, int kernel_size, int stride, int count>() {
    const DepthwiseLaunch launch = depthwise_backward_weight_launch(p, p.slabs, count);
    return launch_kernel(depthwise_backward_weight_kernel<T, kernel_size, stride, count>, launch, stream, p, launch);
  });
}

}  // namespace mobilemamba::cuda
