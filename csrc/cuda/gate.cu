// The gate after the scan on CUDA. A warp computes a row.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"
#include "kernels/gate.h"

namespace mobilemamba::cuda {
namespace {

constexpr int gate_warps = 8;

constexpr int gate_together = 4, gate_parts = 5;  // channels of a load, loads of a lane

/// Whether the rows fit in a warp's registers, and each lane can load several channels at once.
bool in_registers(const GateForward& p) {
  const int64_t bytes = gate_together * (p.dtype == DType::float64 ? 8 : p.dtype == DType::float32 ? 4 : 2);
  const auto aligned = [&](const void* x, int64_t bytes) { return reinterpret_cast<uintptr_t>(x) % bytes == 0; };
  return p.dtype != DType::float64 && p.channels <= gate_parts * gate_together * warp_size &&
         p.channels % gate_together == 0 && p.z_row % gate_together == 0 && aligned(p.y, bytes) &&
         aligned(p.z, bytes) && aligned(p.output, bytes) && aligned(p.weight, 16) && aligned(p.bias, 16);
}

/// Reads each row once. A lane has `gate_parts` times `gate_together` channels.
template <typename T>
__global__ void __launch_bounds__(gate_warps* warp_size)
    gate_forward_registers_kernel(const __grid_constant__ GateForward p, const __grid_constant__ Launch launch) {
  using Elements = Channels<T, gate_together>;
  using Parameters = Channels<float, gate_together>;
  const int channels = static_cast<int>(p.channels);
  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const int64_t row = task * gate_warps + threadIdx.y;
    if (row >= p.rows) continue;  // the whole warp
    Elements y[gate_parts], z[gate_parts];
    const auto each = [&](auto&& body) {
#pragma unroll
      for (int part = 0; part < gate_parts; ++part)
        if (const int c = (part * warp_size + threadIdx.x) * gate_together; c < channels) body(part, c);
    };
    each([&](int part, int c) {
      y[part] = load_channels<T, gate_together>(static_cast<const T*>(p.y) + row * p.channels + c);
      z[part] = load_channels<T, gate_together>(static_cast<const T*>(p.z) + row * p.z_row + c);
    });
    float sum[1] = {}, squares[1] = {};
    each([&](int part, int) {
#pragma unroll
      for (int i = 0; i < gate_together; ++i)
        sum[0] += widen(y[part].value[i]);
    });
    const float mean = warp_sums<1>(sum) / static_cast<float>(channels);
    each([&](int part, int) {
#pragma unroll
      for (int i = 0; i < gate_together; ++i) {
        const float difference = widen(y[part].value[i]) - mean;
        squares[0] += difference * difference;
      }
    });
    const float scale = 1.0f / sqrt(warp_sums<1>(squares) / static_cast<float>(channels) + static_cast<float>(p.eps));
    each([&](int part, int c) {
      const Parameters weight = load_channels<float, gate_together>(static_cast<const float*>(p.weight) + c);
      const Parameters bias = load_channels<float, gate_together>(static_cast<const float*>(p.bias) + c);
      Elements output;
#pragma unroll
      for (int i = 0; i < gate_together; ++i) {
        const float factor = widen(z[part].value[i]), normalized = (widen(y[part].value[i]) - mean) * scale;
        output.value[i] = narrow<T>((normalized * weight.value[i] + bias.value[i]) * (factor * sigmoid_of<T>(factor)));
      }
      store_channels(static_cast<T*>(p.output) + row * p.channels + c, output);
    });
  }
}

/// Any number of channels.
template <typename T>
__global__ void __launch_bounds__(gate_warps* warp_size)
    gate_forward_kernel(const __grid_constant__ GateForward p, const __grid_constant__ Launch launch) {
  using Acc = typename AccumulateOf<T>::type;
  const Acc *weight = static_cast<const Acc*>(p.weight), *bias = static_cast<const Acc*>(p.bias);
  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const int64_t row = task * gate_warps + threadIdx.y;
    if (row >= p.rows) continue;  // the whole warp
    const T* y = static_cast<const T*>(p.y) + row * p.channels;
    const T* z = static_cast<const T*>(p.z) + row * p.z_row;
    T* output = static_cast<T*>(p.output) + row * p.channels;
    Acc sum[1] = {}, squares[1] = {};
    for (int64_t c = threadIdx.x; c < p.channels; c += warp_size)
      sum[0] += widen(y[c]);
    const Acc mean = warp_sums<1>(sum) / static_cast<Acc>(p.channels);
    for (int64_t c = threadIdx.x; c < p.channels; c += warp_size) {
      const Acc difference = widen(y[c]) - mean;
      squares[0] += difference * difference;
    }
    const Acc scale = Acc(1) / sqrt(warp_sums<1>(squares) / static_cast<Acc>(p.channels) + static_cast<Acc>(p.eps));
    for (int64_t c = threadIdx.x; c < p.channels; c += warp_size)
      output[c] = narrow<T>(gate((widen(y[c]) - mean) * scale, weight[c], bias[c], widen(z[c])));
  }
}

}  // namespace

cudaError_t gate_forward(const GateForward& p, cudaStream_t stream) {
  const Launch launch = {ceil_div(p.rows, gate_warps), gate_warps, 0};
  return for_type(p.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) < 8)
      if (in_registers(p)) return launch_kernel(gate_forward_registers_kernel<T>, launch, stream, p, launch);
    return launch_kernel(gate_forward_kernel<T>, launch, stream, p, launch);
  });
}

}  // namespace mobilemamba::cuda
