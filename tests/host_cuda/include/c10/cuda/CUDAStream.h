// Also registers the kernels for CPU tensors: the macro below makes TORCH_LIBRARY_IMPL(mobilemamba, CUDA, m) do so.
#pragma once
#include <torch/library.h>

#include "cuda_runtime_api.h"

#define CUDA CPU

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() {
  return host_cuda::current_stream;
}
}  // namespace c10::cuda
