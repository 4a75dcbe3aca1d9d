// The interface of the CUDA kernels: functions that launch them and return an error code. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/conv_product.h"
#include "kernels/depthwise.h"
#include "kernels/ffn.h"
#include "kernels/gate.h"
#include "kernels/haar.h"
#include "kernels/packed_conv.h"
#include "kernels/scan.h"

namespace mobilemamba::cuda {

size_t scan_forward_scratch_bytes(const ScanForward& p);
cudaError_t scan_forward(const ScanForward& p, cudaStream_t stream);

void scan_divide_backward(ScanBackward& p);
size_t scan_backward_scratch_bytes(const ScanBackward& p);
cudaError_t scan_backward(const ScanBackward& p, cudaStream_t stream);

// `shared_limit`: bytes of shared memory that a block may have on this device.

cudaError_t haar_forward(const HaarForward& p, size_t shared_limit, cudaStream_t stream);
int64_t haar_backward_weight_slabs(const HaarSizes& p, size_t shared_limit);
cudaError_t haar_backward_weight(const HaarBackwardWeight& p, size_t shared_limit, cudaStream_t stream);

cudaError_t depthwise_forward(const DepthwiseForward& p, size_t shared_limit, cudaStream_t stream);
cudaError_t depthwise_backward_input(const DepthwiseBackwardInput& p, cudaStream_t stream);
int64_t depthwise_backward_weight_slabs(const DepthwiseSizes& p, size_t shared_limit);
cudaError_t depthwise_backward_weight(const DepthwiseBackwardWeight& p, size_t shared_limit, cudaStream_t stream);

cudaError_t gate_forward(const GateForward& p, cudaStream_t stream);
/// Where gate_product_launch() says that the launch exists.
struct RowTileLaunch;
cudaError_t gate_product(const GateProduct& p, const RowTileLaunch& launch, cudaStream_t stream);

/// Where conv_product_launch() says that the launch exists.
cudaError_t conv_product(const ConvProduct& p, const RowTileLaunch& launch, cudaStream_t stream);

/// For 16-bit elements, on devices of compute capability 8.0 and later.
cudaError_t packed_conv(const PackedConvForward& p, cudaStream_t stream);
/// A part of packed_conv, for what has_line_conv() says.
struct ProductLaunch;
cudaError_t line_conv(const PackedConvForward& p, const ProductLaunch& launch, cudaStream_t stream);

/// Where ffn_launch() says that the launch exists.
struct FfnLaunch;
cudaError_t ffn_forward(const FfnForward& p, const FfnLaunch& launch, cudaStream_t stream);

}  // namespace mobilemamba::cuda
