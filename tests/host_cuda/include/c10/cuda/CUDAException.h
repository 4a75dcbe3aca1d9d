#pragma once
#include <c10/util/Exception.h>

#include "cuda_runtime_api.h"

#define C10_CUDA_CHECK(call)                                                               \
  do {                                                                                     \
    const cudaError_t code = call;                                                         \
    TORCH_CHECK(code == cudaSuccess, "CUDA error ", static_cast<int>(code), " in " #call); \
  } while (0)
