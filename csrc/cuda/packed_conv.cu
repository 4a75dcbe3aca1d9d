// The product of patches and packed weight on CUDA, with everything that follows it, on tensor cores: 16-bit elements,
// float32 sums, one rounding. A block computes a tile of the output, a warp 32 columns of it: a panel of the weight.
// The block copies slices of 32 inputs of its rows and columns to shared memory, several slices ahead.
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/tensor_core.cuh"

namespace mobilemamba::cuda {
namespace {

constexpr int slice = 32;                // inputs
constexpr int slice_pairs = slice / 2;   // of adjacent inputs, as the weight is packed
constexpr int slice_chunks = slice / 8;  // of 16 bytes in a row of inputs
constexpr int panel_chunks = 8;          // of 16 bytes in a pair of a panel
constexpr int panel = PackedConvForward::panel;
constexpr int stages = product_stages;

/// `warps_down` by `warps_across` warps, each with `row_blocks` times 16 rows and a panel.
template <int warps_down, int warps_across, int row_blocks_>
struct TileShape {
  static constexpr int row_blocks = row_blocks_;
  static constexpr int warps = warps_down * warps_across, threads = warps * warp_size;
  static constexpr int rows = warps_down * row_blocks * 16, panels = warps_across;
  static constexpr int row_bytes = rows * slice * 2, stage_bytes = row_bytes + panels * panel * slice * 2;
};

/// 16 bytes, which are the unit of every copy.
template <typename T>
using Chunk = Channels<T, 16 / sizeof(T)>;

/// Where a chunk of a row is in shared memory. Chunks of a row change places, so that the eight rows that an
/// instruction reads are in different banks.
__device__ __forceinline__ int place_of(int row, int chunk) {
  return (row * slice_chunks + (chunk ^ (row / 2 % 4))) * 16;
}

// Each thread copies the same chunk of some rows of the tile, `step` apart, in every slice. --------------------------

template <typename Shape>
constexpr int copied_rows = Shape::rows * slice_chunks / Shape::threads;
template <typename Shape>
constexpr int copied_step = Shape::threads / slice_chunks;

/// The rows of a matrix, aligned to 16 bytes.
template <typename T, typename Shape>
class MatrixRows {
 public:
  __device__ MatrixRows(const PackedConvForward& p, int64_t first_row, int thread)
      : input_(thread % slice_chunks * 8), place_(place_of(thread / slice_chunks, thread % slice_chunks)) {
    const int64_t row = first_row + thread / slice_chunks, left = p.rows() - row;
    from_ = static_cast<const T*>(p.input.data) + row * p.input.column + input_;
    rows_ = left > Shape::rows ? Shape::rows : static_cast<int>(left);
  }

  /// Copies the next slice.
  __device__ __forceinline__ void copy(const PackedConvForward& p, unsigned char* shared) {
    const int left = static_cast<int>(p.in_channels) - input_, bytes = left >= 8 ? 16 : left > 0 ? left * 2 : 0;
#pragma unroll
    for (int i = 0; i < copied_rows<Shape>; ++i) {
      constexpr int step = copied_step<Shape>;
      static_assert(step % 8 == 0, "so that the chunk's place is the same in all rows");
      const bool inside = bytes > 0 && i * step < rows_;
      copy_async(shared + place_ + i * step * slice_chunks * 16,
                 inside ? from_ + i * step * p.input.column : p.input.data, inside ? bytes : 0);
    }
    from_ += slice;
    input_ += slice;
  }

 private:
  const T* from_;
  int input_, rows_;
  const int place_;
};

/// The place of an input in the patch.
struct Tap {
  int y, x, channel;

  __device__ Tap(const PackedConvForward& p, int input) {
    const int channels = static_cast<int>(p.in_channels), kernel = static_cast<int>(p.kernel), tap = input / channels;
    channel = input - tap * channels;
    y = tap / kernel;
    x = tap - y * kernel;
  }

  __device__ __forceinline__ void advance(const PackedConvForward& p, int inputs) {
    for (channel += inputs; channel >= p.in_channels; channel -= static_cast<int>(p.in_channels))
      if (++x == p.kernel) x = 0, ++y;
  }
};

/// Where the patch of a row begins. Rows beyond the last one have no patch.
struct Patch {
  int y, x;        // of its first pixel, which may be outside the image
  int64_t origin;  // of that pixel

  __device__ __forceinline__ void set(const PackedConvForward& p, int64_t row) {
    if (p.in_place()) {  // a matrix, whose rows may be more than an int can count
      y = row < p.rows() ? 0 : static_cast<int>(p.height);
      x = 0;
      origin = row * p.input.column;
      return;
    }
    const int64_t across = row / p.out_width(), batch = across / p.out_height();
    y = static_cast<int>((across - batch * p.out_height()) * p.stride - p.kernel / 2);
    x = static_cast<int>((row - across * p.out_width()) * p.stride - p.kernel / 2);
    origin = batch * p.input.batch + y * p.input.row + x * p.input.column;
    if (row >= p.rows()) y = static_cast<int>(p.height);  // no tap is inside the image
  }
  __device__ __forceinline__ bool has(const PackedConvForward& p, const Tap& tap) const {
    return y + tap.y >= 0 && y + tap.y < p.height && x + tap.x >= 0 && x + tap.x < p.width;
  }
};

__device__ __forceinline__ int64_t offset_of(const PackedConvForward& p, const Tap& tap) {
  return tap.y * p.input.row + tap.x * p.input.column + tap.channel;
}

/// The patches of images whose pixels are aligned to 16 bytes and have a multiple of 8 channels.
template <typename T, typename Shape>
class ImagePatches {
 public:
  __device__ ImagePatches(const PackedConvForward& p, int64_t first_row, int thread)
      : tap_(p, thread % slice_chunks * 8), place_(place_of(thread / slice_chunks, thread % slice_chunks)) {
#pragma unroll
    for (int i = 0; i < copied_rows<Shape>; ++i)
      patch_[i].set(p, first_row + thread / slice_chunks + i * copied_step<Shape>);
  }

  __device__ __forceinline__ void copy(const PackedConvForward& p, unsigned char* shared) {
    const T* data = static_cast<const T*>(p.input.data);
    const int64_t offset = offset_of(p, tap_);
#pragma unroll
    for (int i = 0; i < copied_rows<Shape>; ++i) {
      const bool inside = tap_.y < p.kernel && patch_[i].has(p, tap_);
      copy_async(shared + place_ + i * copied_step<Shape> * slice_chunks * 16,
                 inside ? data + patch_[i].origin + offset : data, inside ? 16 : 0);
    }
    tap_.advance(p, slice);
  }

 private:
  Tap tap_;
  Patch patch_[copied_rows<Shape>];
  const int place_;
};

/// The patches of any images, one element at a time. A thread takes chunks of one row, so that the lanes of a warp are
/// at the same element of neighbouring patches. A patch consists of runs of adjacent elements: rows of pixels where
/// pixels are adjacent, otherwise pixels.
template <typename T, typename Shape>
class AnyPatches {
 public:
  static_assert(Shape::threads % Shape::rows == 0);

  __device__ AnyPatches(const PackedConvForward& p, int64_t first_row, int thread)
      : pixels_(p.input.column == p.in_channels ? static_cast<int>(p.kernel) : 1),
        row_(thread % Shape::rows),
        chunk_(thread / Shape::rows) {
    patch_.set(p, first_row + row_);
  }

  __device__ __forceinline__ void copy(const PackedConvForward& p, unsigned char* shared) {
    const int length = pixels_ * static_cast<int>(p.in_channels);  // of a run
#pragma unroll 1
    for (int chunk = chunk_; chunk < slice_chunks; chunk += Shape::threads / Shape::rows) {
      const int first = first_ + chunk * 8;
      int number = first / length, at = first - number * length;
      Run run = run_of(p, number, length);
      Chunk<T> elements;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool inside = at >= run.begin && at < run.end;
        elements.value[i] = inside ? run.data[at] : narrow<T>(0.0f);
        if (++at == length) {
          at = 0;
          run = run_of(p, ++number, length);
        }
      }
      *reinterpret_cast<Chunk<T>*>(shared + place_of(row_, chunk)) = elements;
    }
    first_ += slice;
  }

 private:
  /// The elements [begin, end) of a run are in the image.
  struct Run {
    const T* data;
    int begin, end;
  };

  __device__ __forceinline__ Run run_of(const PackedConvForward& p, int number, int length) const {
    const int runs = static_cast<int>(p.kernel) / pixels_;  // in a row of the patch
    const int down = number / runs, across = number - down * runs, y = patch_.y + down, x = patch_.x + across;
    Run run;
    run.data = static_cast<const T*>(p.input.data) + patch_.origin + down * p.input.row + across * p.input.column;
    const int channels = static_cast<int>(p.in_channels);
    const int64_t left = p.width - x;  // pixels from x on
    const bool exists = down < p.kernel && y >= 0 && y < p.height && left > 0;
    run.begin = x < 0 ? -x * channels : 0;
    run.end = !exists ? 0 : left < pixels_ ? static_cast<int>(left) * channels : length;
    return run;
  }

  int first_ = 0;
  const int pixels_;  // of a run
  const int row_, chunk_;
  Patch patch_;
};

/// The tile's panels of the weight.
template <typename T, typename Shape>
class Panels {
 public:
  __device__ Panels(const PackedConvForward& p, int64_t first_panel, int thread) : pair_(thread / panel_chunks) {
    static_assert(Shape::threads >= 4 * panel_chunks && slice_pairs * panel_chunks % Shape::threads % 32 == 0);
    from_ = static_cast<const Chunk<T>*>(p.weight) + first_panel * p.pairs() * panel_chunks + thread;
    panels_ = static_cast<int>(p.panels() - first_panel < Shape::panels ? p.panels() - first_panel : Shape::panels);
    // The words that a warp reads together, of four pairs and eight columns, are in different banks.
    place_ = ((thread & ~(panel_chunks - 1)) + (thread % panel_chunks ^ (pair_ % 4 * 2))) * 16;
  }

  __device__ __forceinline__ void copy(const PackedConvForward& p, unsigned char* shared) {
    constexpr int chunks = slice_pairs * panel_chunks;  // of a panel
    const int pairs = static_cast<int>(p.pairs());
#pragma unroll
    for (int i = 0; i < Shape::panels * chunks / Shape::threads; ++i) {
      const int at = i * Shape::threads, which = (pair_ + at / panel_chunks) / slice_pairs;
      const int within = (pair_ + at / panel_chunks) % slice_pairs;  // pair of the slice
      const bool inside = first_ + within < pairs && which < panels_;
      const int64_t from = static_cast<int64_t>(which) * (pairs - slice_pairs) * panel_chunks + at;
      copy_async(shared + place_ + at * 16, inside ? from_ + from : p.weight, inside ? 16 : 0);
    }
    from_ += chunks;
    first_ += slice_pairs;
  }

 private:
  const Chunk<T>* from_;
  int first_ = 0, panels_, place_;
  const int pair_;
};

// What follows the sums ----------------------------------------------------------------------------------------------

/// Adds 8 elements, or `count` of them, to `value`.
template <typename T>
__device__ __forceinline__ void add_elements(const void* from, int64_t at, int count, bool aligned, float (&value)[8]) {
  const T* elements = static_cast<const T*>(from) + at;
  if (aligned && count == 8) {
    const Chunk<T> chunk = load_channels<T, 8>(elements);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      value[i] += widen(chunk.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) value[i] += widen(elements[i]);
  }
}

/// Where a warp's sums are in shared memory: rows of 32, in groups of 4 that change places against conflicts of banks.
__device__ __forceinline__ int sums_place(int row, int column) {
  return row * panel + ((column / 4) ^ (row % 4 * 2)) * 4 + column % 4;
}

/// Computes the outputs from a warp's sums: rows from `first_row` on, columns from `first_column` on. A lane takes 8
/// columns of every eighth row.
template <typename T, int rows>
__device__ __forceinline__ void finish(const PackedConvForward& p, const ProductLaunch& launch, const float* sums,
                                       int64_t first_row, int64_t first_column) {
  const int lane = threadIdx.x, quad = lane % 4;
  const int64_t column = first_column + quad * 8, left = p.out_channels - column;
  const int count = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  if (count == 0) return;
  float bias[8] = {};
  if (p.bias)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) bias[i] = static_cast<const float*>(p.bias)[column + i];
#pragma unroll 1
  for (int down = lane / 4; down < rows; down += 8) {
    const int64_t row = first_row + down;
    if (row >= p.rows()) return;
    float value[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto four = load_channels<float, 4>(sums + sums_place(down, quad * 8 + half * 4));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        value[half * 4 + i] = four.value[i] + bias[half * 4 + i];
    }
    const auto add_residual = [&] {
      add_elements<T>(p.residual, row * p.residual_row + column, count, launch.aligned_residual, value);
    };
    if (p.residual && p.residual_inside) add_residual();
    if (p.activation == Activation::relu)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        value[i] = max(value[i], 0.0f);
    if (p.residual && !p.residual_inside) add_residual();
    if (p.second_residual)
      add_elements<T>(p.second_residual, row * p.second_residual_row + column, count, launch.aligned_second, value);
    T* to = static_cast<T*>(p.output) + row * p.output_row + column;
    Chunk<T> chunk;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      chunk.value[i] = narrow<T>(value[i]);
    if (launch.aligned_output && count == 8) {
      store_channels(to, chunk);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < count) to[i] = chunk.value[i];
    }
  }
}

template <typename T, typename Shape, template <typename, typename> typename Inputs>
__global__ void __launch_bounds__(Shape::threads, 512 / Shape::threads)
    packed_conv_kernel(const __grid_constant__ PackedConvForward p, const __grid_constant__ ProductLaunch launch) {
  constexpr int row_blocks = Shape::row_blocks, warp_rows = row_blocks * 16;
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * warp_size + lane, group = lane / 4, quad = lane % 4;
  const int warp_across = warp % Shape::panels, first_warp_row = warp / Shape::panels * warp_rows;
  const int slices = static_cast<int>(ceil_div(p.patch(), slice));
  // The same in every slice: where this lane's words of the weight and its rows of matrices are.
  int weight_at[4];
#pragma unroll
  for (int column = 0; column < 4; ++column)
    weight_at[column] =
        Shape::row_bytes +
        ((warp_across * slice_pairs + quad) * panel_chunks + ((2 * column + group / 4) ^ (quad * 2))) * 16 +
        group % 4 * 4;
  int row_at[2];  // of each half; blocks of rows are 16 rows apart
#pragma unroll
  for (int half = 0; half < 2; ++half)
    row_at[half] = place_of(first_warp_row + lane % 16, half * 2 + lane / 16);

  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const int64_t first_panel = task % launch.columns * Shape::panels, first_row = task / launch.columns * Shape::rows;
    Inputs<T, Shape> inputs(p, first_row, thread);
    Panels<T, Shape> panels(p, first_panel, thread);
    const auto copy = [&](int number) {
      if (number < slices) {
        unsigned char* stage = shared_memory + number % stages * Shape::stage_bytes;
        inputs.copy(p, stage);
        panels.copy(p, stage + Shape::row_bytes);
      }
      commit_copies();
    };
    float sum[row_blocks][4][4] = {};
#pragma unroll 1
    for (int i = 0; i < stages - 1; ++i)
      copy(i);
#pragma unroll 1
    for (int number = 0; number < slices; ++number) {
      wait_for_copies<stages - 2>();
      __syncthreads();  // this slice is there, and all warps have read the one whose place the next copy takes
      copy(number + stages - 1);
      const unsigned char* stage = shared_memory + number % stages * Shape::stage_bytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the slice: 16 inputs
        uint32_t b[4][2];
#pragma unroll
        for (int column = 0; column < 4; ++column)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            b[column][i] =
                *reinterpret_cast<const uint32_t*>(stage + weight_at[column] + (half * 8 + i * 4) * panel_chunks * 16);
#pragma unroll
        for (int block = 0; block < row_blocks; ++block) {
          uint32_t a[4];
          load_matrices(a, stage + row_at[half] + block * 16 * slice_chunks * 16);
#pragma unroll
          for (int column = 0; column < 4; ++column)
            multiply_add<T>(sum[block][column], a, b[column]);
        }
      }
    }
    wait_for_copies<0>();
    __syncthreads();  // the sums take the place of the slices

    // A warp's sums go through shared memory, so that each lane stores 8 adjacent elements.
    static_assert(Shape::rows * Shape::panels * panel * sizeof(float) <= stages * Shape::stage_bytes);
    float* sums = reinterpret_cast<float*>(shared_memory) + warp * warp_rows * panel;
#pragma unroll
    for (int block = 0; block < row_blocks; ++block)
#pragma unroll
      for (int column = 0; column < 4; ++column)
#pragma unroll
        for (int down = 0; down < 2; ++down) {
          const Channels<float, 2> two = {sum[block][column][2 * down], sum[block][column][2 * down + 1]};
          const int at = sums_place(group, column * 8 + quad * 2) + (block * 16 + down * 8) * panel;
          *reinterpret_cast<Channels<float, 2>*>(sums + at) = two;
        }
    __syncwarp();
    finish<T, warp_rows>(p, launch, sums, first_row + first_warp_row, (first_panel + warp_across) * panel);
    __syncthreads();  // the next task's slices take the place of the sums
  }
}

}  // namespace

cudaError_t packed_conv(const PackedConvForward& p, cudaStream_t stream) {
  const ProductLaunch launch = product_launch(p);
  const auto with_type = [&]<typename T, typename Shape>() {
    const auto kernel = !launch.aligned ? packed_conv_kernel<T, Shape, AnyPatches>
                        : p.in_place()  ? packed_conv_kernel<T, Shape, MatrixRows>
                                        : packed_conv_kernel<T, Shape, ImagePatches>;
    return launch_kernel(kernel, launch, stream, p, launch);
  };
  const auto run = [&]<int warps_down, int warps_across, int row_blocks>() {
    using Shape = TileShape<warps_down, warps_across, row_blocks>;
    return p.dtype == DType::float16 ? with_type.template operator()<__half, Shape>()
                                     : with_type.template operator()<__nv_bfloat16, Shape>();
  };
  switch (launch.shape) {
    case ProductShape::large:
      return run.template operator()<2, 4, 4>();
    case ProductShape::medium:
      return run.template operator()<2, 2, 4>();
    case ProductShape::narrow:
      return run.template operator()<4, 1, 2>();
    case ProductShape::small:
      return run.template operator()<2, 1, 1>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace mobilemamba::cuda
