// The convolution on a packed weight on the CPU.
#include "ops/packed_conv2d.h"

#include "cpu/backends.h"
#include "cpu/run.h"
#include "ops/kernel_of.h"
#include "registration.h"

namespace mobilemamba::cpu {

const Kernel<PackedConvForward>& packed_conv_kernel(const PackedConvForward& p) {
  if (p.quantized) return kernels().packed_conv_int8;
  return p.dtype == DType::bfloat16 ? kernels().packed_conv_bfloat16 : kernels().packed_conv;
}

void run_packed_conv(const PackedConvForward& p) {
  run(packed_conv_kernel(p), p);
}

namespace {

at::Tensor packed_conv2d_cpu(const PackedConvArguments& a) {
  return a.input.scalar_type() == at::kDouble ? a.with_torch() : a.with(run_packed_conv);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("packed_conv2d", kernel_of<packed_conv2d, packed_conv2d_cpu>);
}

}  // namespace mobilemamba::cpu
