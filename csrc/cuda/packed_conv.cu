// The product of patches and packed weight on CUDA, with everything that follows it, on tensor cores: 16-bit elements,
// float32 sums, one rounding. A block computes a tile of the output, a warp 32 columns of it: a panel of the weight.
// The block copies slices of 32 inputs of its rows and columns to shared memory, several slices ahead.
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/product_outputs.cuh"
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

/// The rows of a matrix, aligned to 16 bytes, of a multiple of 8 inputs.
template <typename T, typename Shape>
class MatrixRows {
 public:
  __device__ MatrixRows(const PackedConvForward& p, const ProductLaunch& launch, int64_t first_row, int thread)
      : input_(thread % slice_chunks * 8), place_(place_of(thread / slice_chunks, thread % slice_chunks)) {
    const int64_t row = first_row + thread / slice_chunks, left = launch.rows - row;
    from_ = static_cast<const T*>(p.input.data) + row * p.input.column + input_;
    rows_ = left > Shape::rows ? Shape::rows : static_cast<int>(left);
  }

  /// Copies the next slice.
  __device__ __forceinline__ void copy(const PackedConvForward& p, unsigned char* shared) {
    constexpr int step = copied_step<Shape>;
    static_assert(step % 8 == 0, "so that the chunk's place is the same in all rows");
    const int rows = input_ < p.in_channels ? rows_ : 0;
    const T* from = from_;
#pragma unroll
    for (int i = 0; i < copied_rows<Shape>; ++i, from += step * p.input.column)
      copy_async(shared + place_ + i * step * slice_chunks * 16, from, i * step < rows ? 16 : 0);
    from_ += slice;
    input_ += slice;
  }

 private:
  const T* from_;
  int input_, rows_, place_;
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

  __device__ __forceinline__ bool has(const PackedConvForward& p, const Tap& tap) const {
    return static_cast<unsigned>(y + tap.y) < static_cast<unsigned>(p.height) &&
           static_cast<unsigned>(x + tap.x) < static_cast<unsigned>(p.width);
  }
};

/// The patches of a tile, from its first row on.
class Patches {
 public:
  __device__ Patches(const PackedConvForward& p, const ProductLaunch& launch, int64_t first_row)
      : p_(p), launch_(launch), first_row_(first_row) {
    const int64_t line = first_row / launch.out_width;
    batch_ = line / launch.out_height;
    y_ = static_cast<unsigned>(line - batch_ * launch.out_height);
    x_ = static_cast<unsigned>(first_row - line * launch.out_width);
  }

  /// That of the row `down` rows after the first one.
  __device__ __forceinline__ Patch at(int down) const {
    const int64_t row = first_row_ + down;
    const bool exists = row < launch_.rows;
    if (p_.in_place())  // a matrix, whose rows may be more than an int can count
      return {exists ? 0 : static_cast<int>(p_.height), 0, row * p_.input.column};
    const unsigned height = static_cast<unsigned>(launch_.out_height), width = static_cast<unsigned>(launch_.out_width);
    unsigned x = x_ + down, y = y_ + x / width;
    x %= width;
    const int64_t batch = batch_ + y / height;
    y %= height;
    Patch patch;
    patch.y = static_cast<int>(y * p_.stride - p_.kernel / 2);
    patch.x = static_cast<int>(x * p_.stride - p_.kernel / 2);
    patch.origin = batch * p_.input.batch + patch.y * p_.input.row + patch.x * p_.input.column;
    if (!exists) patch.y = static_cast<int>(p_.height);  // no tap is inside the image
    return patch;
  }

 private:
  const PackedConvForward& p_;
  const ProductLaunch& launch_;
  int64_t first_row_, batch_;
  unsigned y_, x_;
};

__device__ __forceinline__ int64_t offset_of(const PackedConvForward& p, const Tap& tap) {
  return tap.y * p.input.row + tap.x * p.input.column + tap.channel;
}

/// The patches of images whose pixels are aligned to 16 bytes and have a multiple of 8 channels.
template <typename T, typename Shape>
class ImagePatches {
 public:
  __device__ ImagePatches(const PackedConvForward& p, const ProductLaunch& launch, int64_t first_row, int thread)
      : tap_(p, thread % slice_chunks * 8), place_(place_of(thread / slice_chunks, thread % slice_chunks)) {
    const Patches patches(p, launch, first_row);
#pragma unroll
    for (int i = 0; i < copied_rows<Shape>; ++i)
      patch_[i] = patches.at(thread / slice_chunks + i * copied_step<Shape>);
  }

  __device__ __forceinline__ void copy(const PackedConvForward& p, unsigned char* shared) {
    const T* from = static_cast<const T*>(p.input.data) + offset_of(p, tap_);
#pragma unroll
    for (int i = 0; i < copied_rows<Shape>; ++i) {
      const bool inside = tap_.y < p.kernel && patch_[i].has(p, tap_);
      copy_async(shared + place_ + i * copied_step<Shape> * slice_chunks * 16, from + patch_[i].origin,
                 inside ? 16 : 0);
    }
    tap_.advance(p, slice);
  }

 private:
  Tap tap_;
  Patch patch_[copied_rows<Shape>];
  int place_;
};

/// The patches of any images, one element at a time. A thread takes chunks of one row, so that the lanes of a warp are
/// at the same element of neighbouring patches. A patch consists of runs of adjacent elements: rows of pixels where
/// pixels are adjacent, otherwise pixels.
template <typename T, typename Shape>
class AnyPatches {
 public:
  static_assert(Shape::threads % Shape::rows == 0);

  __device__ AnyPatches(const PackedConvForward& p, const ProductLaunch& launch, int64_t first_row, int thread)
      : pixels_(p.input.column == p.in_channels ? static_cast<int>(p.kernel) : 1),
        row_(thread % Shape::rows),
        chunk_(thread / Shape::rows),
        patch_(Patches(p, launch, first_row).at(row_)) {}

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
  int pixels_;  // of a run
  int row_, chunk_;
  Patch patch_;
};

/// The tile's panels of the weight. Each thread copies a chunk of every panel that is `apart` panels on, or, where the
/// block has fewer threads than a panel has chunks in a slice, several chunks of one.
template <typename T, typename Shape>
class Panels {
 public:
  __device__ Panels(const PackedConvForward& p, int64_t first_panel, int thread) {
    const int panel = thread / chunks, chunk = thread % chunks;
    from_ = static_cast<const Chunk<T>*>(p.weight) + (first_panel + panel) * p.pairs() * panel_chunks + chunk;
    const int64_t left = p.panels() - first_panel - panel;
    panels_ = left > Shape::panels ? Shape::panels : static_cast<int>(left);
    pairs_ = static_cast<int>(p.pairs()) - chunk / panel_chunks;
    // The words that half a warp reads together, of four pairs and eight columns, are in different banks.
    place_ = ((thread & ~(panel_chunks - 1)) + (chunk % panel_chunks ^ (chunk / panel_chunks % 4 * 2))) * 16;
  }

  /// Copies the next slice.
  __device__ __forceinline__ void copy(const PackedConvForward& p, unsigned char* shared) {
    const Chunk<T>* from = from_;
    const int64_t step = apart > 0 ? apart * p.pairs() * panel_chunks : Shape::threads;
#pragma unroll
    for (int i = 0; i < Shape::panels * chunks / Shape::threads; ++i, from += step) {
      const bool inside = apart > 0 ? i * apart < panels_ && pairs_ > 0 : i * Shape::threads / panel_chunks < pairs_;
      copy_async(shared + place_ + i * Shape::threads * 16, from, inside ? 16 : 0);
    }
    from_ += chunks;
    pairs_ -= slice_pairs;
  }

 private:
  static constexpr int chunks = slice_pairs * panel_chunks;  // of a panel in a slice
  static constexpr int apart = Shape::threads / chunks;
  static_assert(Shape::threads % chunks == 0 || (chunks % Shape::threads == 0 && Shape::panels == 1));
  const Chunk<T>* from_;
  int panels_, pairs_, place_;  // panels and pairs that exist from this thread's first chunk on
};

/// A place among the tiles of the output, or a way from one to another. Columns of tiles count first.
struct Tile {
  int64_t down;
  int across;

  __device__ Tile(int64_t number, const ProductLaunch& launch)
      : down(number / launch.columns), across(static_cast<int>(number - down * launch.columns)) {}
  __device__ __forceinline__ bool exists(const ProductLaunch& launch) const { return down < launch.lines; }
  __device__ __forceinline__ void move(const Tile& way, const ProductLaunch& launch) {
    down += way.down;
    across += way.across;
    if (across >= launch.columns) across -= static_cast<int>(launch.columns), ++down;
  }
};

/// The weight is the left side of each instruction and the rows are the columns of its right side: so a lane reads two
/// adjacent words of the weight at a time, and its sums are those of adjacent outputs.
template <typename T, typename Shape, template <typename, typename> typename Inputs>
__global__ void __launch_bounds__(Shape::threads, 512 / Shape::threads)
    packed_conv_kernel(const __grid_constant__ PackedConvForward p, const __grid_constant__ ProductLaunch launch) {
  constexpr int row_blocks = Shape::row_blocks, warp_rows = row_blocks * 16;
  const int lane = threadIdx.x, warp = threadIdx.y, thread = warp * warp_size + lane, group = lane / 4, quad = lane % 4;
  const int warp_across = warp % Shape::panels, first_warp_row = warp / Shape::panels * warp_rows;
  const int slices = static_cast<int>(ceil_div(p.patch(), slice));
  // The same in every slice: where this lane's words of the weight and its rows are. Rows `group` and `group + 8` of an
  // instruction's left side are made the adjacent outputs 2 * group and 2 * group + 1 of its half of the panel.
  int weight_at[2], row_at[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    weight_at[half] = Shape::row_bytes +
                      ((warp_across * slice_pairs + quad) * panel_chunks + ((half * 4 + group / 2) ^ (quad * 2))) * 16 +
                      group % 2 * 8;
    row_at[half] = place_of(first_warp_row + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2);
  }

  // Copies run ahead of the products, also into the next tile: while the outputs of one are stored, the slices of the
  // next are under way.
  const Tile first(blockIdx.x, launch), to_next(gridDim.x, launch);
  Tile copied = first;
  int copied_slice = 0, copied_stage = 0;
  Inputs<T, Shape> inputs(p, launch, copied.down * Shape::rows, thread);
  Panels<T, Shape> panels(p, copied.across * Shape::panels, thread);
  const auto copy = [&] {
    if (copied.exists(launch)) {
      unsigned char* stage = shared_memory + copied_stage * Shape::stage_bytes;
      inputs.copy(p, stage);
      panels.copy(p, stage + Shape::row_bytes);
      if (++copied_stage == stages) copied_stage = 0;
      if (++copied_slice == slices) {
        copied_slice = 0;
        copied.move(to_next, launch);
        if (copied.exists(launch)) {
          inputs = Inputs<T, Shape>(p, launch, copied.down * Shape::rows, thread);
          panels = Panels<T, Shape>(p, copied.across * Shape::panels, thread);
        }
      }
    }
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < stages - 1; ++i)
    copy();

  int read_stage = 0;
  for (Tile tile = first; tile.exists(launch); tile.move(to_next, launch)) {
    float sum[row_blocks][2][2][4] = {};  // blocks of 8 rows, halves of the panel
#pragma unroll 1
    for (int number = 0; number < slices; ++number) {
      wait_for_copies<stages - 2>();
      __syncthreads();  // this slice is there, and all warps have read the one whose place the next copy takes
      copy();
      const unsigned char* stage = shared_memory + read_stage * Shape::stage_bytes;
      if (++read_stage == stages) read_stage = 0;
#pragma unroll
      for (int step = 0; step < 2; ++step) {  // 16 inputs
        uint32_t a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const auto words = load_channels<uint32_t, 2>(
                reinterpret_cast<const uint32_t*>(stage + weight_at[half] + (step * 8 + i * 4) * panel_chunks * 16));
            a[half][2 * i] = words.value[0];
            a[half][2 * i + 1] = words.value[1];
          }
#pragma unroll
        for (int block = 0; block < row_blocks; ++block) {
          uint32_t rows[4];
          load_matrices(rows, stage + row_at[step] + block * 16 * slice_chunks * 16);
#pragma unroll
          for (int eight = 0; eight < 2; ++eight) {
            const uint32_t b[2] = {rows[2 * eight], rows[2 * eight + 1]};
#pragma unroll
            for (int half = 0; half < 2; ++half)
              multiply_add<T>(sum[block][eight][half], a[half], b);
          }
        }
      }
    }

    const LaneOutputs<2, 2> outputs(p.bias, p.out_channels,
                                    (tile.across * Shape::panels + warp_across) * panel + group * 2);
    const int64_t first_lane_row = tile.down * Shape::rows + first_warp_row + quad * 2;
    const auto value_of = [&](int i, float (&value)[2][2]) {  // of the lane's row i: two rows of every eight
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int output = 0; output < 2; ++output)
          value[half][output] = sum[i / 4][i / 2 % 2][half][output * 2 + i % 2];
    };
    if (launch.whole_outputs) {
#pragma unroll
      for (int i = 0; i < row_blocks * 4; ++i) {
        float value[2][2];
        value_of(i, value);
        if (const int64_t row = first_lane_row + i / 2 * 8 + i % 2; row < launch.rows)
          outputs.template store<T, true>(p, launch, row, value);
      }
    } else {
      // Unrolled, this code would leave the instruction cache: these sums go through the thread's memory instead.
      float value[row_blocks * 4][2][2];
#pragma unroll
      for (int i = 0; i < row_blocks * 4; ++i)
        value_of(i, value[i]);
#pragma unroll 1
      for (int i = 0; i < row_blocks * 4; ++i)
        if (const int64_t row = first_lane_row + i / 2 * 8 + i % 2; row < launch.rows)
          outputs.template store<T, false>(p, launch, row, value[i]);
    }
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
    case ProductShape::lines:
      return line_conv(p, launch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mobilemamba::cuda
