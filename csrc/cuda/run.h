// Device, stream and error messages: the parts of torch that every CUDA operator uses.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

namespace mobilemamba::cuda {

/// Throws if a launch failed. If the library has no kernel for the device's arch, the message says how to rebuild it.
void check_launch(cudaError_t error);

/// Makes the device of an operator's main argument the current one. A tensor that is not on CUDA changes nothing here:
/// the operator's checks refuse it.
class DeviceOf {
 public:
  explicit DeviceOf(const at::Tensor& main) : guard_(main.is_cuda() ? std::optional(main.device()) : std::nullopt) {}

 private:
  c10::cuda::OptionalCUDAGuard guard_;
};

struct Capability {
  int major, minor;
};

/// Of the current device.
Capability compute_capability();

/// How layers are computed that have a kernel for several steps: as their sizes ask for, or, for measurements and tests
/// that set MOBILEMAMBA_CUDA_FORM to "kernel" or "products", by that kernel wherever it can run or never.
enum class Form { by_size, kernel, products };
Form chosen_form();

/// Bytes of shared memory that a block may have on the current device.
size_t shared_limit();

}  // namespace mobilemamba::cuda
