// Without CUDA kernels the operators throw an error for CUDA tensors that says how to build them: no silent slow path.
#ifndef MOBILEMAMBA_CUDA
#include <ATen/core/dispatch/Dispatcher.h>

#include "registration.h"

namespace mobilemamba {
namespace {

void no_kernel(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), ": the library was built without CUDA; rebuild it in an ",
                              "environment with a CUDA torch and nvcc, with FORCE_CUDA=1 pip install ",
                              "--force-reinstall --no-deps . in the checkout");
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CUDA, m) {
  for (const char* name :
       {"bidirectional_scan", "bidirectional_scan_backward", "haar_conv2d", "haar_conv2d_backward_weight",
        "depthwise_conv2d", "depthwise_conv2d_backward", "conv_norm", "conv_norm_backward", "ffn_norm",
        "ffn_norm_backward", "packed_conv2d", "ffn", "ffn_backward", "mrffi", "mrffi_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<no_kernel>());
}

}  // namespace mobilemamba
#endif
