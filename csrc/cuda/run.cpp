// The message of a failed launch, and a device's limits; see run.h.
#include "cuda/run.h"

#include <cuda_runtime_api.h>

#include "build.h"

namespace mobilemamba::cuda {
namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

void check_launch(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    (void)cudaGetLastError();  // clears the error: the message below reports it
    const auto [major, minor] = compute_capability();
    TORCH_CHECK(false, "mobilemamba: the GPU has compute capability ", major, ".", minor,
                ", and the library was built for ", build::cuda_archs, "; rebuild it with TORCH_CUDA_ARCH_LIST=", major,
                ".", minor, " FORCE_CUDA=1 pip install --force-reinstall --no-deps . in the checkout");
  }
  C10_CUDA_CHECK(error);
}

Capability compute_capability() {
  return {attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrComputeCapabilityMinor)};
}

size_t shared_limit() {
  return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

}  // namespace mobilemamba::cuda
