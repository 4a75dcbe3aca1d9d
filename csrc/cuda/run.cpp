// The message of a failed launch, and a device's limits; see run.h.
#include "cuda/run.h"

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string_view>

#include <map>
#include <mutex>

#include "build.h"

namespace mobilemamba::cuda {
namespace {

struct Facts {
  Capability capability;
  size_t shared_limit;
};

/// Of the current device. A launch asks for them: they are read once for each device.
Facts facts() {
  static std::mutex mutex;
  static std::map<int, Facts> known;
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
    return value;
  };
  const Facts read = {
      {attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrComputeCapabilityMinor)},
      static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
  };
  return known.emplace(device, read).first->second;
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
  return facts().capability;
}

Form chosen_form() {
  const char* setting = std::getenv("MOBILEMAMBA_CUDA_FORM");
  const std::string_view form = setting ? setting : "";
  return form == "kernel" ? Form::kernel : form == "products" ? Form::products : Form::by_size;
}

size_t shared_limit() {
  return facts().shared_limit;
}

}  // namespace mobilemamba::cuda
