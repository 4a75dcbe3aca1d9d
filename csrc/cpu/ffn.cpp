// The feed-forward layer on the CPU: both products of some rows, then of the next, so that what is between them stays
// in the cache.
#include "ops/ffn.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>

#include "cpu/backends.h"
#include "cpu/row_product.h"
#include "cpu/run.h"
#include "ops/common.h"
#include "registration.h"

namespace mobilemamba::cpu {
namespace {

/// Of a chunk of rows: about its most hidden numbers, which stay in the second cache until they are used, and its
/// fewest rows, which pay for the pass over the weights.
constexpr int64_t chunk_numbers = 1 << 16, chunk_least_rows = 48;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// How many chunks of about equal size, as many for each thread; 0 where there are too few rows for that. It says
/// nothing about the results: no sum depends on what other rows its product has.
int64_t chunks_of(int64_t rows, int64_t hidden) {
  const int64_t threads = at::get_num_threads(), most = rows / chunk_least_rows;
  if (most < threads) return 0;
  const int64_t wanted = ceil_div(rows, std::max(chunk_least_rows, chunk_numbers / hidden));
  return std::min(most, ceil_div(wanted, threads) * threads);
}

/// What the kernel is told of the products of some rows. All matrices are contiguous.
struct Layer {
  const FfnRows& rows;
  void* output;
  int64_t channels = rows.input.size(1), hidden = rows.weights.expand_bias.size(0);
  RowProduct expand{rows.weights.expand_weight, rows.weights.expand_bias, channels, hidden};
  RowProduct project{rows.weights.project_weight, rows.weights.project_bias, hidden, channels};

  int64_t hidden_bytes(int64_t count) const { return count * hidden * rows.input.element_size(); }

  PackedConvForward expansion(int64_t first, int64_t count, void* to) const {
    PackedConvForward p = expand.of(count, row(rows.input, first), channels, to, hidden);
    p.activation = Activation::relu;
    return p;
  }

  PackedConvForward projection(int64_t first, int64_t count, const void* from) const {
    PackedConvForward p = project.of(count, from, hidden, static_cast<std::byte*>(output) + offset(first), channels);
    p.residual = row(rows.input, first);
    p.residual_row = channels;
    if (rows.residual) {
      p.second_residual = row(*rows.residual, first);
      p.second_residual_row = channels;
    }
    return p;
  }

 private:
  int64_t offset(int64_t row) const { return row * channels * rows.input.element_size(); }
  const void* row(const at::Tensor& matrix, int64_t i) const {
    return static_cast<const std::byte*>(matrix.const_data_ptr()) + offset(i);
  }
};

void run_in_chunks(const Layer& layer, int64_t rows, int64_t chunks) {
  const int64_t most = ceil_div(rows, chunks);
  const Kernel<PackedConvForward>& kernel = packed_conv_kernel(kernel_dtype(layer.rows.input.scalar_type()));
  const size_t hidden_bytes = ceil_div(layer.hidden_bytes(most), 64) * 64;
  const size_t scratch_bytes = std::max(kernel.scratch_bytes(layer.expansion(0, most, nullptr)),
                                        kernel.scratch_bytes(layer.projection(0, most, nullptr)));
  at::parallel_for(0, ceil_div(rows, most), 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr memory = c10::GetCPUAllocator()->allocate(hidden_bytes + scratch_bytes);  // 64-byte aligned
    std::byte *const hidden = static_cast<std::byte*>(memory.get()), *const scratch = hidden + hidden_bytes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * most, count = std::min(most, rows - first);
      for (const PackedConvForward& p : {layer.expansion(first, count, hidden), layer.projection(first, count, hidden)})
        kernel.run(p, 0, kernel.tasks(p), scratch);
    }
  });
}

at::Tensor run_layer(const FfnRows& rows) {
  const at::Tensor& x = rows.input;
  if (x.scalar_type() == at::kDouble) return ffn_with_torch(rows);
  at::Tensor output = at::empty(x.sizes(), x.options());
  const Layer layer{rows, output.mutable_data_ptr()};
  const int64_t count = x.size(0);
  if (const int64_t chunks = chunks_of(count, layer.hidden)) {
    run_in_chunks(layer, count, chunks);
  } else {  // each product by all threads
    at::Tensor hidden = at::empty({count, layer.hidden}, x.options());
    run_packed_conv(layer.expansion(0, count, hidden.mutable_data_ptr()));
    run_packed_conv(layer.projection(0, count, hidden.const_data_ptr()));
  }
  return output;
}

at::Tensor forward(const at::Tensor& input, const std::optional<at::Tensor>& residual, const at::Tensor& expand_weight,
                   const at::Tensor& expand_bias, const at::Tensor& project_weight, const at::Tensor& project_bias) {
  return FfnArguments{input, {expand_weight, expand_bias, project_weight, project_bias}}.with(run_layer, residual);
}

FfnGradients backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& expand_weight,
                      const at::Tensor& expand_bias, const at::Tensor& project_weight, const at::Tensor& project_bias) {
  return ffn_backward_composed(grad_output, {input, {expand_weight, expand_bias, project_weight, project_bias}});
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("ffn", forward);
  m.impl("ffn_backward", backward);
}

}  // namespace mobilemamba::cpu
