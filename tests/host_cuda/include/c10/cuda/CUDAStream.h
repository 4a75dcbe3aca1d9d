// Also makes the kernels those of CPU tensors: TORCH_LIBRARY_IMPL(mobilemamba, CUDA, m) registers them for the CPU.
#pragma once
#include <torch/library.h>

#include "cuda_runtime_api.h"

#define CUDA CPU

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() {
  return host_cuda::current_stream;
}
}  // namespace c10::cuda
