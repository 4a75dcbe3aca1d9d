// The bidirectional scan on CUDA: device, stream and scratch memory for the launch.
#include "ops/bidirectional_scan.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/kernels.h"

namespace mobilemamba::cuda {
namespace {

at::Tensor forward(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A_log, const at::Tensor& B,
                   const at::Tensor& C, const at::Tensor& D, const at::Tensor& dt_weight, const at::Tensor& dt_bias) {
  const ScanArguments arguments{u, delta, A_log, B, C, D, dt_weight, dt_bias};
  arguments.check();
  const c10::cuda::CUDAGuard device(u.device());
  const ScanInputs inputs(arguments);
  at::Tensor y = scan_output(u);
  const ScanForward params = inputs.forward(y);
  int most = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, u.device().index()));
  TORCH_CHECK(scan_forward_shared_bytes(params) <= static_cast<size_t>(most),
              "bidirectional_scan: rank R = ", params.rank, " and state size N = ", params.state, " need ",
              scan_forward_shared_bytes(params), " bytes of shared memory, and ", u.device(), " has ", most);
  const auto bytes = static_cast<int64_t>(scan_forward_scratch_bytes(params));
  const at::Tensor scratch = at::empty({bytes}, u.options().dtype(at::kByte));
  C10_CUDA_CHECK(scan_forward(params, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(mobilemamba, CUDA, m) {
  m.impl("bidirectional_scan", forward);
}

}  // namespace mobilemamba::cuda
