// The CPU kernels as the operators see them: a table of functions for the best instruction set of this machine.
//
// A kernel splits its problem into tasks, and run() computes tasks [begin, end). Each thread calls run() with scratch
// memory of its own, 64-byte aligned. The result of a task does not depend on which thread runs it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/depthwise.h"
#include "kernels/gate.h"
#include "kernels/haar.h"
#include "kernels/norm.h"
#include "kernels/packed_conv.h"
#include "kernels/scan.h"
#include "kernels/weight_gradient.h"

namespace mobilemamba::cpu {

template <typename Params>
struct Kernel {
  int64_t (*tasks)(const Params&);
  size_t (*scratch_bytes)(const Params&);
  void (*run)(const Params&, int64_t begin, int64_t end, std::byte* scratch);
};

/// What the scan's backward kernel expects of ScanBackward.
constexpr int64_t scan_group_channels = 64, scan_segments = 1;

struct Kernels {
  const char* name;
  Kernel<ScanForward> scan_forward;
  Kernel<ScanBackward> scan_backward;
  Kernel<HaarForward> haar_forward;
  Kernel<HaarBackwardWeight> haar_backward_weight;
  Kernel<DepthwiseForward> depthwise_forward;
  Kernel<DepthwiseBackwardInput> depthwise_backward_input;
  Kernel<DepthwiseBackwardWeight> depthwise_backward_weight;
  Kernel<GateForward> gate_forward;
  Kernel<NormStatistics> norm_statistics;
  Kernel<NormForward> norm_forward;
  Kernel<NormBackwardSums> norm_backward_sums;
  Kernel<NormBackwardInput> norm_backward_input;
  Kernel<PackedConvForward> packed_conv;
  Kernel<PackedConvForward> packed_conv_bfloat16;
  Kernel<PackedConvForward> packed_conv_int8;
  Kernel<WeightGradient> weight_gradient;
};

namespace generic {
extern const Kernels kernels;
}
#ifdef __x86_64__
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernel<PackedConvForward> packed_conv_bfloat16;
}
namespace avx512vnni {
extern const Kernel<PackedConvForward> packed_conv_int8;
}
namespace amx {
extern const Kernel<PackedConvForward> packed_conv_bfloat16, packed_conv_int8;
/// Whether this processor has AMX, and the system lets this process use it.
bool available();
}  // namespace amx
#elif defined(__aarch64__)
namespace dotprod {
extern const Kernel<PackedConvForward> packed_conv_int8;
}
#endif

/// The kernels for the best instruction set that this processor has (and ATEN_CPU_CAPABILITY permits).
const Kernels& kernels();

}  // namespace mobilemamba::cpu
