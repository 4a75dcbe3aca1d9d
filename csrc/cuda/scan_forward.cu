// The bidirectional scan, forward. A thread owns a channel and walks along the sequence, so that neighbouring threads
// load neighbouring channels; a block shares delta, B and C, which do not depend on the channel.
//
// y is the sum of both directions and is written once. So the sequence is cut into chunks: a first walk from the end
// keeps direction 1's states at the seams, then each chunk runs direction 1 into shared memory and direction 0 on top.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/kernels.h"

namespace mobilemamba::cuda {
namespace {

constexpr int threads = 64;
constexpr int chunk_length = 32;

__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__device__ __forceinline__ T narrow(typename AccumulateOf<T>::type x) {
  if constexpr (sizeof(T) != 2)
    return x;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return __float2bfloat16_rn(x);
}

__host__ __device__ inline int64_t chunks(const ScanForward& p) {
  return (p.length + chunk_length - 1) / chunk_length;
}

template <typename T, typename Acc>
class ChannelScan {
 public:
  __device__ ChannelScan(const ScanForward& p, Acc* shared)
      : p_(p),
        lane_(threadIdx.x),
        channel_(static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x),
        batch_(blockIdx.y),
        active_(channel_ < p.channels),
        weight_(shared),
        rows_(weight_ + p.rank * threads),
        y_(rows_ + chunk_length * p.rows()),
        A_(y_ + chunk_length * threads),
        h_{A_ + p.state * threads, A_ + 2 * p.state * threads},
        u_(static_cast<const T*>(p.u) + batch_ * p.u_batch + channel_),
        out_(static_cast<T*>(p.y) + batch_ * p.length * p.channels + channel_) {}

  __device__ void run(Acc* seams) {
    seams += batch_ * chunks(p_) * p_.state * p_.channels + channel_;
    for (int64_t n = 0; n < p_.state; ++n)
      h_[0][n * threads + lane_] = h_[1][n * threads + lane_] = Acc(0);
    if (chunks(p_) > 1) {
      load_parameters(1);
      for (int64_t chunk = chunks(p_) - 1; chunk >= 0; --chunk) {
        if (active_)
          for (int64_t n = 0; n < p_.state; ++n)
            seams[(chunk * p_.state + n) * p_.channels] = h_[1][n * threads + lane_];
        if (chunk > 0) walk(chunk, 1, [](int, Acc) {});
      }
    }
    for (int64_t chunk = 0; chunk < chunks(p_); ++chunk) {
      if (chunks(p_) > 1 && active_)
        for (int64_t n = 0; n < p_.state; ++n)
          h_[1][n * threads + lane_] = seams[(chunk * p_.state + n) * p_.channels];
      load_parameters(1);
      walk(chunk, 1, [this](int i, Acc y) { y_[i * threads + lane_] = y; });
      load_parameters(0);
      walk(chunk, 0, [this, chunk](int i, Acc y) {
        out_[(chunk * chunk_length + i) * p_.channels] = narrow<T>(y + y_[i * threads + lane_]);
      });
    }
  }

 private:
  /// Direction k's parameters of this thread's channel. Each thread reads only what it wrote itself.
  __device__ void load_parameters(int k) {
    if (!active_) return;
    const auto at = [&](const void* data, int64_t row, int64_t rows) {
      return static_cast<const Acc*>(data)[(k * rows + row) * p_.channels + channel_];
    };
    for (int64_t r = 0; r < p_.rank; ++r)
      weight_[r * threads + lane_] = at(p_.dt_weight, r, p_.rank);
    for (int64_t n = 0; n < p_.state; ++n)
      A_[n * threads + lane_] = -exp(at(p_.A_log, n, p_.state));
    bias_ = at(p_.dt_bias, 0, 1);
    D_ = at(p_.D, 0, 1);
  }

  /// Delta, B and C of a chunk, in the type of sums, by the whole block.
  __device__ void load_rows(int64_t begin, int length, int k) {
    __syncthreads();  // the rows of the chunk before have been read
    const int count = static_cast<int>(p_.rows());
    for (int i = lane_; i < length * count; i += threads) {
      const int row = i % count;
      const bool is_delta = row < p_.rank, is_B = row < p_.rank + p_.state;
      const ScanRows& from = is_delta ? p_.delta : is_B ? p_.B : p_.C;
      const int64_t in_row = is_delta ? row : is_B ? row - p_.rank : row - p_.rank - p_.state;
      rows_[i] = widen(static_cast<const T*>(from.data)[batch_ * from.batch + k * from.direction + in_row * from.row +
                                                        (begin + i / count) * from.position]);
    }
    __syncthreads();
  }

  /// Direction k through one chunk; `emit` gets each position's index in the chunk and its y.
  template <typename Emit>
  __device__ void walk(int64_t chunk, int k, Emit emit) {
    const int64_t begin = chunk * chunk_length;
    const int length = static_cast<int>(p_.length - begin < chunk_length ? p_.length - begin : chunk_length);
    load_rows(begin, length, k);
    if (!active_) return;
    for (int step = 0; step < length; ++step) {
      const int i = k == 0 ? step : length - 1 - step;
      const Acc *row = rows_ + i * p_.rows(), *b = row + p_.rank, *c = b + p_.state;
      Acc x = bias_;
      for (int64_t r = 0; r < p_.rank; ++r)
        x += weight_[r * threads + lane_] * row[r];
      const Acc u = widen(u_[(begin + i) * p_.u_position]), dt = softplus(x), dt_u = dt * u;
      Acc y = D_ * u;
      for (int64_t n = 0; n < p_.state; ++n) {
        Acc& h = h_[k][n * threads + lane_];
        h = scan_step(h, exp(dt * A_[n * threads + lane_]), dt_u, b[n]);
        y += c[n] * h;
      }
      emit(i, y);
    }
  }

  const ScanForward& p_;
  const int lane_;
  const int64_t channel_, batch_;
  const bool active_;
  Acc *const weight_, *const rows_, *const y_, *const A_;
  Acc* const h_[2];
  const T* const u_;
  T* const out_;
  Acc bias_, D_;
};

template <typename T>
__global__ void __launch_bounds__(threads) scan_forward_kernel(const __grid_constant__ ScanForward p, void* seams) {
  using Acc = typename AccumulateOf<T>::type;
  extern __shared__ __align__(16) unsigned char shared[];
  ChannelScan<T, Acc>(p, reinterpret_cast<Acc*>(shared)).run(static_cast<Acc*>(seams));
}

template <typename T>
cudaError_t launch(ScanForward p, void* seams, cudaStream_t stream) {
  const auto kernel = scan_forward_kernel<T>;
  const size_t bytes = scan_forward_shared_bytes(p);
  if (bytes > 48 * 1024) {  // beyond what every device grants unasked: ask for all, so that threads ask for the same
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   most);
    if (error != cudaSuccess) return error;
  }
  // the batch is the grid's y dimension, which ends at 65535
  const int64_t batch = p.batch, most = 65535;
  const size_t element = sizeof(T), sum = accumulate_bytes(p.dtype);
  for (int64_t first = 0; first < batch; first += most) {
    p.batch = batch - first < most ? batch - first : most;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>((p.channels + threads - 1) / threads), static_cast<unsigned>(p.batch));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p, seams);
    if (error != cudaSuccess) return error;
    const auto advance = [&](auto& data, int64_t elements, size_t size) {
      data = (char*)data + elements * static_cast<int64_t>(size);
    };
    advance(p.u, p.batch * p.u_batch, element);
    advance(p.y, p.batch * p.length * p.channels, element);
    advance(seams, p.batch * chunks(p) * p.state * p.channels, sum);
    for (ScanRows* rows : {&p.delta, &p.B, &p.C})
      advance(rows->data, p.batch * rows->batch, element);
  }
  return cudaSuccess;
}

}  // namespace

size_t scan_forward_shared_bytes(const ScanForward& p) {
  // dt_weight, the rows of a chunk, y of direction 1, A and both directions' states
  const int64_t numbers = p.rank * threads + chunk_length * p.rows() + chunk_length * threads + 3 * p.state * threads;
  return numbers * accumulate_bytes(p.dtype);
}

size_t scan_forward_scratch_bytes(const ScanForward& p) {
  if (chunks(p) <= 1) return 0;
  return p.batch * chunks(p) * p.state * p.channels * accumulate_bytes(p.dtype);
}

cudaError_t scan_forward(const ScanForward& p, void* scratch, cudaStream_t stream) {
  if (p.batch == 0 || p.channels == 0 || p.length == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::float32:
      return launch<float>(p, scratch, stream);
    case DType::float64:
      return launch<double>(p, scratch, stream);
    case DType::float16:
      return launch<__half>(p, scratch, stream);
    case DType::bfloat16:
      return launch<__nv_bfloat16>(p, scratch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mobilemamba::cuda
