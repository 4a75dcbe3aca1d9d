// Depthwise convolution of planes on CUDA, forward and the gradient of its weight. The Haar convolution has four
// planes, the sub-bands. The depthwise convolution has one, the image; it comes here for the sizes that models do not
// use.
//
// An operator `Op` reads a plane's elements from an image and stores the results; the kernels do the rest. For the
// sizes that models use (`kernel_size` > 0) a block stages a tile of its input, with the border, in shared memory, and
// a thread computes a strip of outputs of one channel. For any other size (`kernel_size` 0) a thread reads its input
// from global memory for every product, which is slow.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"

namespace mobilemamba::cuda {

constexpr int plane_max_threads = 8 * warp_size;
constexpr int plane_blocks = 2;  // resident on a multiprocessor: limits a thread to 128 registers

/// A tile of positions of one batch entry, for 32 channels.
struct Tile {
  int64_t batch, y, x;

  __device__ Tile(const PlaneLaunch& launch, int64_t tile)
      : batch(tile / launch.tiles_x / launch.tiles_y),
        y(tile / launch.tiles_x % launch.tiles_y * launch.tile_height),
        x(tile % launch.tiles_x * launch.tile_width) {}
};

/// The lane's channel. Lanes past the last channel read the last channel and discard the result.
struct Channel {
  int64_t index;
  bool active;

  __device__ Channel(int64_t tile, int64_t channels) : index(tile * warp_size + threadIdx.x), active(index < channels) {
    if (!active) index = channels - 1;
  }
};

/// An image as its only plane.
template <typename T>
struct PixelPlane {
  using Acc = typename AccumulateOf<T>::type;
  static constexpr int planes = 1;
  const T* data;
  int64_t row, column, height, width;

  __device__ PixelPlane(const Image& image, int64_t height, int64_t width, int64_t batch, int64_t channel)
      : data(static_cast<const T*>(image.data) + batch * image.batch + channel),
        row(image.row),
        column(image.column),
        height(height),
        width(width) {}

  /// Zero beyond the plane.
  __device__ void load(int64_t y, int64_t x, Acc (&value)[1]) const {
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    value[0] = inside ? widen(data[y * row + x * column]) : Acc(0);
  }
};

/// The sub-bands of an image as its planes.
template <typename T>
struct HaarPlanes {
  using Acc = typename AccumulateOf<T>::type;
  static constexpr int planes = 4;
  const PixelPlane<T> pixels;

  __device__ HaarPlanes(const Image& image, int64_t height, int64_t width, int64_t batch, int64_t channel)
      : pixels(image, height, width, batch, channel) {}

  __device__ void load(int64_t y, int64_t x, Acc (&value)[4]) const {
    // beyond the plane, all four pixels are beyond the image
    const T* first = pixels.data + 2 * y * pixels.row + 2 * x * pixels.column;
    const bool above = y >= 0 && 2 * y < pixels.height, below = y >= 0 && 2 * y + 1 < pixels.height;
    const bool left = x >= 0 && 2 * x < pixels.width, right = x >= 0 && 2 * x + 1 < pixels.width;
    const HaarBands<Acc> bands =
        haar(above && left ? widen(first[0]) : Acc(0), above && right ? widen(first[pixels.column]) : Acc(0),
             below && left ? widen(first[pixels.row]) : Acc(0),
             below && right ? widen(first[pixels.row + pixels.column]) : Acc(0));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      value[i] = bands.band[i];
  }
};

/// A tile's input in shared memory, (planes, stage_height, stage_width, 32). Its first row is the plane's `first_row`.
template <typename Acc>
struct Stage {
  Acc* const lane;
  const int height, width;
  int64_t first_row;

  __device__ explicit Stage(const PlaneLaunch& launch)
      : lane(reinterpret_cast<Acc*>(shared_memory) + threadIdx.x),
        height(launch.stage_height),
        width(launch.stage_width) {}

  template <typename Source>
  __device__ void fill(const Source& source, int64_t top, int64_t left) {
    first_row = top < 0 ? 0 : top;
    __syncthreads();  // all threads have read the previous tile
#pragma unroll 4
    for (int i = threadIdx.y; i < height * width; i += blockDim.y) {
      Acc value[Source::planes];
      source.load(first_row + i / width, left + i % width, value);
      for (int plane = 0; plane < Source::planes; ++plane)
        lane[(plane * height * width + i) * warp_size] = value[plane];
    }
    __syncthreads();
  }

  /// A staged element of the plane's row `y`; the next column's element follows at a distance of `warp_size`.
  __device__ const Acc* row(int plane, int64_t y, int column) const {
    return lane + ((plane * height + (y - first_row)) * width + column) * warp_size;
  }
};

// Forward ------------------------------------------------------------------------------------------------------------

/// Computes a strip of outputs of one plane; its first output is in row `y` of the plane and `column` of the tile. Each
/// element of the weight (k, k, C) serves both rows of the strip. A row of the weight is loaded while the row before it
/// is used.
template <int kernel_size, typename Acc>
__device__ __forceinline__ void convolve_strip(const Stage<Acc>& stage, int plane, int64_t plane_height, int64_t y,
                                               int column, const Acc* weight, int64_t channels,
                                               Acc (&out)[strip_height][strip_width]) {
  static_assert(strip_height == 2);
  constexpr int count = strip_width - 1 + kernel_size;
  Acc upper[count], lower[count];
  const auto load = [&](int dy, Acc(&in)[count]) {
    const int64_t from = y - kernel_size / 2 + dy;
    const bool inside = from >= 0 && from < plane_height;
    const Acc* row = stage.row(plane, inside ? from : stage.first_row, column);
#pragma unroll
    for (int i = 0; i < count; ++i)
      in[i] = inside ? row[i * warp_size] : Acc(0);
  };
  Acc w[kernel_size], next[kernel_size];
  const auto load_weights = [&] {
#pragma unroll
    for (int kx = 0; kx < kernel_size; ++kx, weight += channels)
      next[kx] = *weight;
  };
  load_weights();
  load(0, upper);
#pragma unroll 1
  for (int ky = 0; ky < kernel_size; ++ky) {
#pragma unroll
    for (int kx = 0; kx < kernel_size; ++kx)
      w[kx] = next[kx];
    if (ky + 1 < kernel_size) load_weights();
    load(ky + 1, lower);
#pragma unroll
    for (int kx = 0; kx < kernel_size; ++kx)
#pragma unroll
      for (int c = 0; c < strip_width; ++c) {
        out[0][c] += w[kx] * upper[c + kx];
        out[1][c] += w[kx] * lower[c + kx];
      }
#pragma unroll
    for (int i = 0; i < count; ++i)
      upper[i] = lower[i];
  }
}

template <typename Op, int kernel_size>
__global__ void __launch_bounds__(plane_max_threads, plane_blocks)
    plane_forward_kernel(const __grid_constant__ typename Op::Forward p, const __grid_constant__ PlaneLaunch launch) {
  using Acc = typename Op::Acc;
  const int64_t height = Op::out_height(p), width = Op::out_width(p),
                taps = kernel_size > 0 ? kernel_size * kernel_size : p.kernel * p.kernel;
  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const Tile tile(launch, task / launch.channel_tiles);
    const Channel channel(task % launch.channel_tiles, p.channels);
    const typename Op::Source source(p.input, p.height, p.width, tile.batch, channel.index);
    const Acc* weight = static_cast<const Acc*>(p.weight) + channel.index;  // (planes, k, k, C)

    if constexpr (kernel_size > 0) {
      Stage<Acc> stage(launch);
      stage.fill(source, tile.y - kernel_size / 2, tile.x - kernel_size / 2);
      const int strips_x = launch.tile_width / strip_width, strips = launch.tile_height / strip_height * strips_x;
      for (int strip = threadIdx.y; strip < strips; strip += blockDim.y) {
        const int64_t y = tile.y + strip / strips_x * strip_height;
        const int column = strip % strips_x * strip_width;
        Acc out[Op::planes][strip_height][strip_width] = {};
#pragma unroll
        for (int plane = 0; plane < Op::planes; ++plane)
          convolve_strip<kernel_size>(stage, plane, Op::plane_height(p), y, column, weight + plane * taps * p.channels,
                                      p.channels, out[plane]);
#pragma unroll
        for (int r = 0; r < strip_height; ++r)
#pragma unroll
          for (int c = 0; c < strip_width; ++c) {
            const int64_t x = tile.x + column + c;
            Acc value[Op::planes];
#pragma unroll
            for (int plane = 0; plane < Op::planes; ++plane)
              value[plane] = out[plane][r][c];
            if (channel.active && y + r < height && x < width) Op::store(p, tile.batch, channel.index, y + r, x, value);
          }
      }
    } else {
      for (int i = threadIdx.y; i < launch.tile_height * launch.tile_width; i += blockDim.y) {
        const int64_t y = tile.y + i / launch.tile_width, x = tile.x + i % launch.tile_width;
        if (!channel.active || y >= height || x >= width) continue;
        Acc out[Op::planes] = {};
        for (int64_t tap = 0; tap < taps; ++tap) {
          Acc value[Op::planes];
          source.load(y * Op::stride(p) + tap / p.kernel - p.kernel / 2,
                      x * Op::stride(p) + tap % p.kernel - p.kernel / 2, value);
          for (int plane = 0; plane < Op::planes; ++plane)
            out[plane] += weight[(plane * taps + tap) * p.channels] * value[plane];
        }
        Op::store(p, tile.batch, channel.index, y, x, out);
      }
    }
  }
}

// Gradient of the weight ---------------------------------------------------------------------------------------------

/// One plane's element of a source. No variable indexes `value`, so that it stays in registers.
template <typename Source>
__device__ __forceinline__ typename Source::Acc load_plane(const Source& source, int plane, int64_t y, int64_t x) {
  typename Source::Acc value[Source::planes];
  source.load(y, x, value);
  typename Source::Acc result = value[0];
#pragma unroll
  for (int i = 1; i < Source::planes; ++i)
    result = plane == i ? value[i] : result;
  return result;
}

/// Adds the products of one row of `grad` to the sums of one plane.
template <int kernel_size, typename Acc, typename Source>
__device__ __forceinline__ void correlate_row(const Stage<Acc>& stage, int plane, int64_t plane_height,
                                              const Source& grad, int64_t y, int64_t left, int columns,
                                              Acc (&sum)[kernel_size * kernel_size], Acc& grad_bias) {
  for (int column = 0; column < columns; column += strip_width) {
    Acc g[strip_width];
#pragma unroll
    for (int c = 0; c < strip_width; ++c) {
      g[c] = load_plane(grad, plane, y, left + column + c);
      grad_bias += g[c];
    }
#pragma unroll
    for (int ky = 0; ky < kernel_size; ++ky) {
      const int64_t from = y - kernel_size / 2 + ky;
      if (from < 0 || from >= plane_height) continue;
      const Acc* row = stage.row(plane, from, column);
      constexpr int count = strip_width - 1 + kernel_size;
      Acc in[count];
#pragma unroll
      for (int i = 0; i < count; ++i)
        in[i] = row[i * warp_size];
#pragma unroll
      for (int kx = 0; kx < kernel_size; ++kx)
#pragma unroll
        for (int c = 0; c < strip_width; ++c)
          if (column + c < columns) sum[ky * kernel_size + kx] += g[c] * in[c + kx];
    }
  }
}

/// A block sums over one slab of tiles for 32 channels. Each warp takes one plane, and some of its rows.
template <typename Op, int kernel_size>
__global__ void __launch_bounds__(plane_max_threads, plane_blocks)
    plane_backward_weight_kernel(const __grid_constant__ typename Op::BackwardWeight p,
                                 const __grid_constant__ PlaneLaunch launch) {
  using Acc = typename Op::Acc;
  const int warp = threadIdx.y, warps = blockDim.y;
  const int64_t taps = kernel_size > 0 ? kernel_size * kernel_size : p.kernel * p.kernel;
  const int64_t sums = Op::planes * taps + (Op::has_bias ? 1 : 0), tiles = launch.position_tiles(p.batch);
  for (int64_t task = blockIdx.x; task < launch.channel_tiles * p.slabs; task += gridDim.x) {
    const Channel channel(task % launch.channel_tiles, p.channels);
    const int64_t slab = task / launch.channel_tiles;
    const int64_t first = tiles * slab / p.slabs, last = tiles * (slab + 1) / p.slabs;
    const auto out = [&](int64_t i) -> Acc& {
      return static_cast<Acc*>(p.sums)[(slab * sums + i) * p.channels + channel.index];
    };

    if constexpr (kernel_size > 0) {
      const int plane = warp % Op::planes, group = warp / Op::planes, groups = warps / Op::planes;
      Acc sum[kernel_size * kernel_size] = {}, grad_bias = Acc(0);
      for (int64_t i = first; i < last; ++i) {
        const Tile tile(launch, i);
        const typename Op::Source input(p.input, p.height, p.width, tile.batch, channel.index);
        const typename Op::Source grad(p.grad_output, Op::grad_height(p), Op::grad_width(p), tile.batch, channel.index);
        Stage<Acc> stage(launch);
        stage.fill(input, tile.y - kernel_size / 2, tile.x - kernel_size / 2);
        const int64_t left = Op::out_width(p) - tile.x;
        const int columns = left < launch.tile_width ? static_cast<int>(left) : launch.tile_width;
        for (int64_t y = tile.y + group; y < tile.y + launch.tile_height && y < Op::out_height(p); y += groups)
          correlate_row<kernel_size>(stage, plane, Op::plane_height(p), grad, y, tile.x, columns, sum, grad_bias);
      }
      // The groups of warps add their sums in a fixed order.
      Acc* const shared = reinterpret_cast<Acc*>(shared_memory) + threadIdx.x;
      for (int g = 0; g < groups; ++g) {
        __syncthreads();
        if (group != g) continue;
#pragma unroll
        for (int tap = 0; tap < kernel_size * kernel_size; ++tap) {
          Acc& to = shared[(plane * taps + tap) * warp_size];
          to = (g == 0 ? Acc(0) : to) + sum[tap];
        }
        if (Op::has_bias) {
          Acc& to = shared[taps * warp_size];
          to = (g == 0 ? Acc(0) : to) + grad_bias;
        }
      }
      __syncthreads();
      for (int64_t i = warp; i < sums; i += warps)
        if (channel.active) out(i) = shared[i * warp_size];
    } else {
      for (int64_t tap = warp; tap < taps + (Op::has_bias ? 1 : 0); tap += warps) {
        Acc sum[Op::planes] = {};
        for (int64_t i = first; i < last; ++i) {
          const Tile tile(launch, i);
          const typename Op::Source input(p.input, p.height, p.width, tile.batch, channel.index);
          const typename Op::Source grad(p.grad_output, Op::grad_height(p), Op::grad_width(p), tile.batch,
                                         channel.index);
          for (int j = 0; j < launch.tile_height * launch.tile_width; ++j) {
            const int64_t y = tile.y + j / launch.tile_width, x = tile.x + j % launch.tile_width;
            if (y >= Op::out_height(p) || x >= Op::out_width(p)) continue;
            Acc g[Op::planes], in[Op::planes];
            grad.load(y, x, g);
            input.load(y * Op::stride(p) + tap / p.kernel - p.kernel / 2,
                       x * Op::stride(p) + tap % p.kernel - p.kernel / 2, in);
            for (int plane = 0; plane < Op::planes; ++plane)
              sum[plane] += g[plane] * (tap == taps ? Acc(1) : in[plane]);
          }
        }
        for (int plane = 0; plane < Op::planes; ++plane)
          if (channel.active) out(plane * taps + tap) = sum[plane];
      }
    }
  }
}

}  // namespace mobilemamba::cuda
