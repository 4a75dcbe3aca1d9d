// The convolution of few channels on tensor cores: the network's first layer. A line of a patch, 3 pixels, is one run
// of at most 16 elements: the inputs of one instruction. So a lane loads its elements from where they are, and holds
// the whole weight in registers; nothing goes through shared memory. A warp computes 16 outputs of a line at a time.
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"
#include "cuda/product_outputs.cuh"
#include "cuda/tensor_core.cuh"

namespace mobilemamba::cuda {
namespace {

constexpr int lines = line_conv_kernel_size, warps = line_conv_warps, columns_of_step = line_conv_step;
constexpr int blocks_of_8 = PackedConvForward::panel / 8;  // outputs of an instruction

/// The bits of two elements as a register of an instruction has them.
__device__ __forceinline__ uint32_t pair_of(uint16_t first, uint16_t second) {
  return first | static_cast<uint32_t>(second) << 16;
}

/// A lane's elements of a line of two patches, those of output columns x and x + 8: `first` and the next one, then the
/// two that are 8 further. All lines of the patches have the same.
struct LineElements {
  int first;           // from the line's first element
  int pixel[4];        // from the line's first pixel; far outside the image for elements that the line does not have
  int offset[2];       // of the patch's line in the image's line
  unsigned inside[2];  // bit i: whether element i is in the image

  __device__ LineElements(const PackedConvForward& p, int quad) : first(2 * quad) {
    const int channels = static_cast<int>(p.in_channels);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = first + i % 2 + i / 2 * 8;
      pixel[i] = at < lines * channels ? at / channels : line_conv_most_width;
    }
  }

  __device__ __forceinline__ void set(const PackedConvForward& p, int x) {
    const int width = static_cast<int>(p.width);
#pragma unroll
    for (int down = 0; down < 2; ++down) {
      const int column = (x + down * 8) * static_cast<int>(p.stride) - lines / 2;
      offset[down] = column * static_cast<int>(p.in_channels) + first;
      inside[down] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (column + pixel[i] >= 0 && column + pixel[i] < width) inside[down] |= 1u << i;
    }
  }

  /// The rows of an instruction's left side. Without branches, so that loads of several lines are under way together.
  __device__ __forceinline__ void load(const uint16_t* line, bool exists, uint32_t (&a)[4]) const {
#pragma unroll
    for (int down = 0; down < 2; ++down) {
      const uint16_t* from = line + offset[down];
      const unsigned present = exists ? inside[down] : 0;
      uint16_t element[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        element[i] = present >> i & 1 ? from[i % 2 + i / 2 * 8] : uint16_t{0};
      a[down] = pair_of(element[0], element[1]);
      a[2 + down] = pair_of(element[2], element[3]);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(warps* warp_size, 4)
    line_conv_kernel(const __grid_constant__ PackedConvForward p, const __grid_constant__ ProductLaunch launch) {
  const int lane = threadIdx.x, group = lane / 4, quad = lane % 4;
  // A lane gets the sums of the columns 2 * quad and 2 * quad + 1 of each instruction. These are made the outputs
  // 8 * quad + 2 * block and the next one, so that a lane has 8 adjacent outputs.
  uint32_t b[lines][blocks_of_8][2];
  const int run = lines * static_cast<int>(p.in_channels);
#pragma unroll
  for (int line = 0; line < lines; ++line)
#pragma unroll
    for (int block = 0; block < blocks_of_8; ++block)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int output = group / 2 * 8 + block * 2 + group % 2;
        const auto element = [&](int at) {
          const int input = line * run + at;
          const auto* weight = static_cast<const uint16_t*>(p.weight);
          return at < run ? weight[(input / 2 * PackedConvForward::panel + output) * 2 + input % 2] : uint16_t{0};
        };
        b[line][block][half] = pair_of(element(2 * quad + half * 8), element(2 * quad + half * 8 + 1));
      }
  const LaneOutputs<1, 8> outputs(p.bias, p.out_channels, quad * 8);
  LineElements elements(p, quad);

  const int out_width = static_cast<int>(launch.out_width);
  const int part_columns =
      static_cast<int>(ceil_div(ceil_div(out_width, launch.columns), columns_of_step)) * columns_of_step;
  const int64_t parts = launch.lines * launch.columns;
  for (int64_t part = blockIdx.x * warps + threadIdx.y; part < parts; part += static_cast<int64_t>(gridDim.x) * warps) {
    const int64_t out_line = part / launch.columns, batch = out_line / launch.out_height;
    const int begin = static_cast<int>(part - out_line * launch.columns) * part_columns;
    const int end = begin + part_columns < out_width ? begin + part_columns : out_width;
    const int64_t y = (out_line - batch * launch.out_height) * p.stride - lines / 2;
    const uint16_t* first_line = static_cast<const uint16_t*>(p.input.data) + batch * p.input.batch + y * p.input.row;
#pragma unroll 1
    for (int x = begin; x < end; x += columns_of_step) {
      elements.set(p, x + group);
      uint32_t a[lines][4];
#pragma unroll
      for (int line = 0; line < lines; ++line)
        elements.load(first_line + line * p.input.row, y + line >= 0 && y + line < p.height, a[line]);
      float sum[blocks_of_8][4] = {};
#pragma unroll
      for (int line = 0; line < lines; ++line)
#pragma unroll
        for (int block = 0; block < blocks_of_8; ++block)
          multiply_add<T>(sum[block], a[line], b[line][block]);
#pragma unroll
      for (int down = 0; down < 2; ++down) {
        const int column = x + group + down * 8;
        if (column >= end) continue;
        float value[1][8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          value[0][i] = sum[i / 2][down * 2 + i % 2];
        outputs.store<T, false>(p, launch, out_line * out_width + column, value);
      }
    }
  }
}

}  // namespace

cudaError_t line_conv(const PackedConvForward& p, const ProductLaunch& launch, cudaStream_t stream) {
  return launch_kernel(p.dtype == DType::float16 ? line_conv_kernel<__half> : line_conv_kernel<__nv_bfloat16>, launch,
                       stream, p, launch);
}

}  // namespace mobilemamba::cuda
