// The operators' tables of CPU kernels, for operators that call other operators' kernels.
#pragma once

#include "cpu/kernels.h"
#include "ops/bidirectional_scan.h"
#include "ops/depthwise_conv2d.h"
#include "ops/haar_conv2d.h"

namespace mobilemamba::cpu {

extern const ScanBackend scan;
extern const HaarBackend haar;
extern const DepthwiseBackend depthwise;
const Kernel<PackedConvForward>& packed_conv_kernel(const PackedConvForward& p);
void run_packed_conv(const PackedConvForward& p);

}  // namespace mobilemamba::cpu
