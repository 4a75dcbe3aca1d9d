// Instantiates every CPU kernel for one instruction set. Included by isa_*.cpp after the target pragma.
#pragma once

#include "cpu/depthwise_kernels.h"
#include "cpu/gate_kernels.h"
#include "cpu/haar_kernels.h"
#include "cpu/kernels.h"
#include "cpu/norm_kernels.h"
#include "cpu/packed_conv_kernels.h"
#include "cpu/quantized_conv_kernels.h"
#include "cpu/scan_kernels.h"
#include "cpu/weight_gradient_kernels.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// The table's entry for one kernel: functions that call the instantiation for the element type.
template <template <typename> class K, typename Params>
constexpr Kernel<Params> table_entry() {
#define MOBILEMAMBA_BY_DTYPE(p, call) \
  switch (p.dtype) {                  \
    case DType::float32:              \
      return K<float>::call;          \
    case DType::float64:              \
      return K<double>::call;         \
    case DType::float16:              \
      return K<Half>::call;           \
    case DType::bfloat16:             \
      return K<BFloat16>::call;       \
  }                                   \
  __builtin_unreachable()
  return {[](const Params& p) -> int64_t { MOBILEMAMBA_BY_DTYPE(p, tasks(p)); },
          [](const Params& p) -> size_t { MOBILEMAMBA_BY_DTYPE(p, scratch_bytes(p)); },
          [](const Params& p, int64_t begin, int64_t end, std::byte* scratch) -> void {
            MOBILEMAMBA_BY_DTYPE(p, run(p, begin, end, scratch));
          }};
#undef MOBILEMAMBA_BY_DTYPE
}

#define MOBILEMAMBA_STRING_(x) #x
#define MOBILEMAMBA_STRING(x) MOBILEMAMBA_STRING_(x)

// constinit, because an initialiser that runs would be compiled for this instruction set and run on every machine.
constinit const Kernels kernels = {
    MOBILEMAMBA_STRING(MOBILEMAMBA_CPU_ISA),
    table_entry<ScanForwardKernel, ScanForward>(),
    table_entry<ScanBackwardKernel, ScanBackward>(),
    table_entry<HaarForwardKernel, HaarForward>(),
    table_entry<HaarBackwardWeightKernel, HaarBackwardWeight>(),
    table_entry<DepthwiseForwardKernel, DepthwiseForward>(),
    table_entry<DepthwiseBackwardInputKernel, DepthwiseBackwardInput>(),
    table_entry<DepthwiseBackwardWeightKernel, DepthwiseBackwardWeight>(),
    table_entry<GateForwardKernel, GateForward>(),
    table_entry<NormStatisticsKernel, NormStatistics>(),
    table_entry<NormForwardKernel, NormForward>(),
    table_entry<NormBackwardSumsKernel, NormBackwardSums>(),
    table_entry<NormBackwardInputKernel, NormBackwardInput>(),
    {PackedConvKernel<float>::Task::count, packed_conv_scratch_bytes, run_packed_conv},
    {PackedConvKernel<float>::Task::count, packed_conv_scratch_bytes, run_packed_conv},
    quantized_conv<PairProducts>,
    {WeightGradientKernel::tasks, WeightGradientKernel::scratch_bytes, WeightGradientKernel::run},
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
