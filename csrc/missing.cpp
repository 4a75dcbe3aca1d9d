// Operators without a CUDA kernel in this build say so, and how to get one: never a silent slow path.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace mobilemamba {
namespace {

void no_kernel(const c10::OperatorHandle& op, torch::jit::Stack*) {
#ifdef MOBILEMAMBA_CUDA
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), ": this version has no CUDA kernel for it; move the tensors ",
                              "to the CPU");
#else
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(), ": the library was built without CUDA; rebuild it in an ",
                              "environment with a CUDA torch and nvcc, with FORCE_CUDA=1 pip install ",
                              "--force-reinstall --no-deps . in the checkout");
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(mobilemamba, CUDA, m) {
  const auto missing = [] { return torch::CppFunction::makeFromBoxedFunction<no_kernel>(); };
#ifndef MOBILEMAMBA_CUDA
  m.impl("bidirectional_scan", missing());
#endif
  m.impl("bidirectional_scan_backward", missing());
  m.impl("haar_conv2d", missing());
  m.impl("haar_conv2d_backward_weight", missing());
  m.impl("depthwise_conv2d", missing());
  m.impl("depthwise_conv2d_backward", missing());
}

}  // namespace mobilemamba
