// Kernels whose counts follow from the rules, for test_kernel_counters.py: one instruction or a few of one warp each.
#include "cuda/launch_kernel.cuh"
#include "cuda/tensor_core.cuh"

namespace mobilemamba::cuda {
namespace {

constexpr int words = 4096;

template <typename T>
__device__ T* shared() {
  return reinterpret_cast<T*>(shared_memory);
}

__global__ void adjacent(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void strided(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x * 8];
}

__global__ void misaligned(const float* in, float* out) {
  const auto* halves = reinterpret_cast<const uint16_t*>(in);
  reinterpret_cast<uint16_t*>(out)[threadIdx.x] = halves[threadIdx.x + 1];
}

__global__ void wide(const float* in, float* out) {
  store_word(reinterpret_cast<uint4*>(out) + threadIdx.x, reinterpret_cast<const uint4*>(in)[threadIdx.x]);
}

__global__ void one_address(const float* in, float* out) {
  if (threadIdx.x == 0) out[0] = in[0];
}

/// In each pass other lanes leave out the load.
__global__ void branch_in_a_loop(const float* in, float* out) {
  float sum = 0;
#pragma unroll 1
  for (unsigned i = 0; i < 4; ++i)
    if (threadIdx.x % 4 != i) sum += in[i * 32 + threadIdx.x];
  out[threadIdx.x] = sum;
}

/// Odd lanes make one more pass.
__global__ void lengths_of_a_loop(const float* in, float* out) {
  float sum = 0;
#pragma unroll 1
  for (unsigned i = 0; i < threadIdx.x % 2 + 1; ++i)
    sum += in[i * 32 + threadIdx.x];
  out[threadIdx.x] = sum;
}

__global__ void shared_row(const float* in, float* out) {
  shared<float>()[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared<float>()[threadIdx.x ^ 1];
}

__global__ void shared_column(const float*, float* out) {
  out[threadIdx.x] = shared<float>()[threadIdx.x * 32];
}

__global__ void shared_8_bytes(const float*, float* out) {
  reinterpret_cast<uint2*>(out)[threadIdx.x] = shared<uint2>()[threadIdx.x];
}

/// Every other 16 bytes: the lanes of a quarter meet in pairs.
__global__ void shared_16_bytes_apart(const float*, float* out) {
  store_word(reinterpret_cast<uint4*>(out) + threadIdx.x, shared<uint4>()[threadIdx.x * 2]);
}

/// Rows of 16 bytes, 64 apart: two of a matrix's eight rows are in different banks.
__global__ void matrices(const float*, float* out) {
  uint32_t to[4];
  load_matrices(to, shared_memory + threadIdx.x * 64);
  reinterpret_cast<uint32_t*>(out)[threadIdx.x] = to[0] + to[1] + to[2] + to[3];
}

__global__ void products(const float* in, float* out) {
  float sum[4] = {};
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(in) + threadIdx.x;
  const uint32_t a[4] = {bits[0], bits[32], bits[64], bits[96]}, b[2] = {bits[128], bits[160]};
#pragma unroll
  for (int i = 0; i < 3; ++i)
    multiply_add<__half>(sum, a, b);
  out[threadIdx.x] = sum[0] + sum[1] + sum[2] + sum[3];
}

/// 16 lanes read nothing, and write zeros.
__global__ void copies(const float* in, float* out) {
  copy_async(shared_memory + threadIdx.x * 16, in + threadIdx.x * 4, threadIdx.x < 16 ? 16 : 0);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = shared<float>()[threadIdx.x];
}

__global__ void many_blocks(const float* in, float* out) {
  out[blockIdx.x * 32 + threadIdx.x] = in[threadIdx.x];
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int run_kernel(const char* name, const float* in, float* out,
                                                                 int blocks) {
  const Launch launch = {blocks, 1, words * sizeof(float)};
  const std::pair<const char*, void (*)(const float*, float*)> kernels[] = {
      {"adjacent", adjacent},
      {"strided", strided},
      {"misaligned", misaligned},
      {"wide", wide},
      {"one_address", one_address},
      {"branch_in_a_loop", branch_in_a_loop},
      {"lengths_of_a_loop", lengths_of_a_loop},
      {"shared_row", shared_row},
      {"shared_column", shared_column},
      {"shared_8_bytes", shared_8_bytes},
      {"shared_16_bytes_apart", shared_16_bytes_apart},
      {"matrices", matrices},
      {"products", products},
      {"copies", copies},
      {"many_blocks", many_blocks},
  };
  for (const auto& [known, kernel] : kernels)
    if (!std::strcmp(known, name)) return launch_kernel(kernel, launch, host_cuda::current_stream, in, out);
  return -1;
}

}  // namespace mobilemamba::cuda
