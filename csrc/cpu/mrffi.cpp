// The MRFFI block on the CPU. In a large batch each thread takes some images through the whole block. So the
// activations between the layers stay in the cache, and no thread waits for the others after each layer.
#include "ops/mrffi.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>

#include "cpu/backends.h"
#include "cpu/run.h"
#include "ops/matrix.h"
#include "registration.h"

namespace mobilemamba::cpu {
namespace {

void product(const Product& p, at::Tensor output) {
  if (p.input.scalar_type() == at::kDouble) return product_with_torch(p, output);
  product_with_kernel(p, output, run_packed_conv);
}

/// A part has about 128 positions, so that its activations fit in L2. Below 48 positions for each thread the pass over
/// the weights dominates.
constexpr int64_t part_positions = 128, share_least_positions = 48;

/// Each thread takes its share of the images in parts of about equal size. If the shares are small, or
/// the mean share is below 90 % of the largest, all threads work on each layer of the whole batch instead. The results
/// are the same: no image depends on another.
void in_parts(int64_t batch, int64_t positions, c10::function_ref<void(int64_t, int64_t)> run) {
  const int64_t threads = at::get_num_threads(), share = ceil_div(batch, threads);
  if (share * positions < share_least_positions || 10 * batch < 9 * share * threads) return run(0, batch);
  const int64_t parts = threads * std::clamp<int64_t>(share * positions / part_positions, 1, batch / threads);
  parallel(parts, 0, [&](int64_t begin, int64_t end, std::byte*) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // threads do not inherit what the caller excludes from dispatch
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = batch * i / parts, last = batch * (i + 1) / parts;
      run(first, last - first);
    }
  });
}

/// One part, for torch's products: their order of summation may depend on the number of rows.
void whole(int64_t batch, int64_t, c10::function_ref<void(int64_t, int64_t)> run) {
  run(0, batch);
}

MrffiBackend backend(at::ScalarType type) {
  return {
      .scan = scan,
      .haar = haar,
      .depthwise = depthwise,
      .gate = [](const GateForward& p) { run(kernels().gate_forward, p); },
      .conv_product = nullptr,
      .gate_product = nullptr,
      .product = product,
      .in_parts = type == at::kDouble ? whole : in_parts,
  };
}

/// Packs the matrices once for all parts of the batch.
void pack_matrices(MrffiWeights& weights) {
  for (const MrffiWeight& weight : mrffi_weights)
    if (weight.kind == MrffiWeight::Kind::matrix) weights.*weight.tensor = packed_matrix(weights.*weight.tensor);
}

at::Tensor mrffi_cpu(const at::Tensor& input, const std::optional<at::Tensor>& residual, at::TensorList weights,
                     double eps) {
  MrffiArguments arguments{input, MrffiWeights(weights), eps};
  arguments.check(residual);
  if (input.scalar_type() != at::kDouble) pack_matrices(arguments.weights);
  return backend(input.scalar_type()).mrffi(arguments, residual);
}

MrffiGradients mrffi_backward_cpu(const at::Tensor& grad_output, const at::Tensor& input, at::TensorList weights,
                                  double eps) {
  return mrffi_backward_composed(grad_output, {input, MrffiWeights(weights), eps});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("mrffi", mrffi_cpu);
  m.impl("mrffi_backward", mrffi_backward_cpu);
}

}  // namespace mobilemamba::cpu
