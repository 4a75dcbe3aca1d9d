// The gate after the scan on CUDA. A warp computes a row.
#include "cuda/gate_rows.cuh"
#include "cuda/kernels.h"
#include "cuda/launch_kernel.cuh"

namespace mobilemamba::cuda {
namespace {

constexpr int gate_warps = 8;

/// Reads each row once.
template <typename T>
__global__ void __launch_bounds__(gate_warps* warp_size)
    gate_forward_registers_kernel(const __grid_constant__ GateForward p, const __grid_constant__ Launch launch) {
  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const int64_t row = task * gate_warps + threadIdx.y;
    if (row >= p.rows) continue;  // the whole warp
    GateRows<T, gate_parts, 1> rows;
    rows.load(p, [&](int) { return row; });
    rows.normalize(p);
    rows.gated(p, [&](int, int channel, const auto& elements) {
      store_channels(static_cast<T*>(p.output) + row * p.channels + channel, elements);
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
      if (gate_in_registers(p)) return launch_kernel(gate_forward_registers_kernel<T>, launch, stream, p, launch);
    return launch_kernel(gate_forward_kernel<T>, launch, stream, p, launch);
  });
}

}  // namespace mobilemamba::cuda
