// The depthwise convolution before the scan, with SiLU, and the product of its outputs, as one kernel. A block computes
// a tile of positions in strips of a line, and writes them to shared memory too, where a tensor-core product takes
// them.
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/row_tile.cuh"

namespace mobilemamba::cuda {
namespace {

constexpr int kernel_size = 3, conv_strip = 4;  // outputs of a strip

/// The strips of a tile of successive positions: of the line where it begins, and of the lines after it.
class Strips {
 public:
  __device__ Strips(const ConvProduct& p, int64_t first_row, int tile_rows)
      : width_(static_cast<int>(p.width)), height_(static_cast<int>(p.height)) {
    const int64_t left = p.rows() - first_row, line = first_row / width_;
    rows_ = left < tile_rows ? static_cast<int>(left) : tile_rows;
    first_x_ = static_cast<int>(first_row - line * width_);
    first_y_ = static_cast<int>(line % height_);
    first_length_ = width_ - first_x_ < rows_ ? width_ - first_x_ : rows_;
    first_strips_ = (first_length_ + conv_strip - 1) / conv_strip;
    line_strips_ = (width_ + conv_strip - 1) / conv_strip;
    const int rest = rows_ - first_length_, lines = rest / width_;
    count_ = first_strips_ + lines * line_strips_ + (rest - lines * width_ + conv_strip - 1) / conv_strip;
  }

  struct Strip {
    int row, columns;  // of the tile
    int y, x;          // in the image
  };

  __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ Strip at(int number) const {
    Strip strip;
    int line = 0, column = number;
    if (number >= first_strips_) {
      line = (number - first_strips_) / line_strips_;
      column = number - first_strips_ - line * line_strips_;
      strip.row = first_length_ + line * width_ + column * conv_strip;
      strip.x = column * conv_strip;
      ++line;
    } else {
      strip.row = column * conv_strip;
      strip.x = first_x_ + strip.row;
    }
    strip.y = (first_y_ + line) % height_;
    const int in_line = width_ - strip.x, in_tile = rows_ - strip.row, left = in_line < in_tile ? in_line : in_tile;
    strip.columns = left < conv_strip ? left : conv_strip;
    return strip;
  }

 private:
  int width_, height_, rows_, first_x_, first_y_, first_length_, first_strips_, line_strips_, count_;
};

/// Computes the tile's activations. A lane has `conv_product_together` channels of a strip.
template <typename T>
__device__ __forceinline__ void convolve_tile(const ConvProduct& p, const RowTileLaunch& launch, int64_t first_row) {
  constexpr int together = conv_product_together;
  const int channels = static_cast<int>(p.channels), width = static_cast<int>(p.width);
  const int height = static_cast<int>(p.height), parts = (channels + together * warp_size - 1) / (together * warp_size);
  const Strips strips(p, first_row, launch.rows);
  for (int item = threadIdx.y; item < strips.count() * parts; item += launch.warps) {
    const int number = item / parts, channel = ((item - number * parts) * warp_size + threadIdx.x) * together;
    if (channel >= channels) continue;
    const Strips::Strip strip = strips.at(number);
    const int stride = static_cast<int>(p.input_row);
    const T* line = static_cast<const T*>(p.input) + (first_row + strip.row - width - 1) * p.input_row + channel;
    Channels<T, together> pixel[kernel_size][conv_strip + 2];
#pragma unroll
    for (int row = 0; row < kernel_size; ++row, line += width * stride) {
      const bool inside = static_cast<unsigned>(strip.y + row - 1) < static_cast<unsigned>(height);
#pragma unroll
      for (int column = 0; column < conv_strip + 2; ++column) {
        const int x = strip.x + column - 1;
        pixel[row][column] = {};
        if (inside && static_cast<unsigned>(x) < static_cast<unsigned>(width))
          pixel[row][column] = load_channels<T, together>(line + column * stride);
      }
    }
    const auto bias = load_channels<float, together>(static_cast<const float*>(p.conv_bias) + channel);
    float sum[conv_strip * together];
#pragma unroll
    for (int i = 0; i < conv_strip * together; ++i)
      sum[i] = bias.value[i % together];
#pragma unroll
    for (int tap = 0; tap < kernel_size * kernel_size; ++tap) {
      const auto weight =
          load_channels<float, together>(static_cast<const float*>(p.conv_weight) + tap * channels + channel);
#pragma unroll
      for (int i = 0; i < conv_strip * together; ++i)
        sum[i] += weight.value[i % together] *
                  widen(pixel[tap / kernel_size][i / together + tap % kernel_size].value[i % together]);
    }
    activate_all<T>(Activation::silu, sum);
#pragma unroll
    for (int column = 0; column < conv_strip; ++column) {
      if (column >= strip.columns) continue;
      Channels<T, together> elements;
#pragma unroll
      for (int i = 0; i < together; ++i)
        elements.value[i] = narrow<T>(sum[column * together + i]);
      const int row = strip.row + column;
      store_channels(static_cast<T*>(p.activated) + (first_row + row) * channels + channel, elements);
      *reinterpret_cast<Channels<T, together>*>(shared_memory + row * launch.pitch + channel * sizeof(T)) = elements;
    }
  }
  // Inputs of the product that do not exist. Rows beyond the last one may be anything: they are not stored.
  for (int row = threadIdx.y; row < launch.rows; row += launch.warps)
    for (int channel = channels + threadIdx.x; channel < launch.steps * 16; channel += warp_size)
      *reinterpret_cast<T*>(shared_memory + row * launch.pitch + channel * sizeof(T)) = narrow<T>(0.0f);
}

template <typename T>
__global__ void __launch_bounds__(conv_product_across * conv_product_most_down * warp_size, 2)
    conv_product_kernel(const __grid_constant__ ConvProduct p, const __grid_constant__ RowTileLaunch launch) {
  constexpr int across = conv_product_across;
  const int first_output = threadIdx.y % across * 16 + threadIdx.x / 4 * 2;
  const int first_lane_row = threadIdx.y / across * 32 + threadIdx.x % 4 * 2;
  TileProduct<T, across, 1, conv_product_slice_steps> product(p.product_weight, launch);
  for (int64_t tile = blockIdx.x; tile < launch.tasks; tile += gridDim.x) {
    const int64_t first_row = tile * launch.rows;
    __syncthreads();  // all warps have read the previous tile
    product.begin();
    convolve_tile<T>(p, launch, first_row);
    float sum[1][4][4] = {};
    product.add(sum);
    if (first_output >= p.out_channels) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int64_t row = first_row + first_lane_row + i / 2 * 8 + i % 2;
      const Channels<T, 2> pair = {narrow<T>(sum[0][i / 2][i % 2]), narrow<T>(sum[0][i / 2][2 + i % 2])};
      if (row < p.rows()) store_channels(static_cast<T*>(p.output) + row * p.out_channels + first_output, pair);
    }
  }
}

}  // namespace

cudaError_t conv_product(const ConvProduct& p, const RowTileLaunch& launch, cudaStream_t stream) {
  return p.dtype == DType::float16 ? launch_kernel(conv_product_kernel<__half>, launch, stream, p, launch)
                                   : launch_kernel(conv_product_kernel<__nv_bfloat16>, launch, stream, p, launch);
}

}  // namespace mobilemamba::cuda
