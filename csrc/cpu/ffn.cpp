// The feed-forward layer on the CPU. It takes a chunk of rows through both products before the next chunk, so that the
// hidden activations of a chunk stay in the cache.
#include "ops/ffn.h"

#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/backends.h"
#include "cpu/run.h"
#include "ops/common.h"
#include "ops/kernel_of.h"
#include "ops/product.h"
#include "registration.h"

namespace mobilemamba::cpu {
namespace {

/// A chunk's hidden activations must fit in L2: 65,536 elements, 256 KiB in float32. Below 48 rows the pass over the
/// weights dominates.
constexpr int64_t chunk_hidden_elements = 1 << 16, chunk_least_rows = 48;

/// The number of chunks, of about equal size and equally many for each thread; 0 where the rows are too few for that.
/// It does not change the results: no sum depends on the other rows of a product.
int64_t chunks_of(int64_t rows, int64_t hidden) {
  const int64_t threads = at::get_num_threads(), most = rows / chunk_least_rows;
  if (most < threads) return 0;
  const int64_t wanted = at::ceil_div(rows, std::max(chunk_least_rows, chunk_hidden_elements / hidden));
  return std::min(most, at::round_up(wanted, threads));
}

/// The kernel's parameters for the two products of some rows. All matrices are contiguous.
class Layer {
 public:
  Layer(const FfnRows& rows, const at::Tensor& output)
      : input_(rows.input),
        residual_(rows.residual),
        output_(output),
        channels_(input_.size(1)),
        hidden_(rows.weights.expand_bias.size(0)),
        expand_(rows.weights.expand_weight, rows.weights.expand_bias, channels_, hidden_, input_.scalar_type()),
        project_(rows.weights.project_weight, rows.weights.project_bias, hidden_, channels_, input_.scalar_type()) {}

  int64_t hidden() const { return hidden_; }

  /// From `count` rows of the input, beginning with row `first`, to their hidden activations.
  PackedConvForward expansion(int64_t first, int64_t count, void* to) const {
    PackedConvForward p = expand_.of(count, row(input_, first), channels_, to, hidden_);
    p.activation = Activation::relu;
    return p;
  }

  /// From the hidden activations of these rows to the output.
  PackedConvForward projection(int64_t first, int64_t count, const void* from) const {
    void* to = static_cast<std::byte*>(output_.mutable_data_ptr()) + offset(first);
    PackedConvForward p = project_.of(count, from, hidden_, to, channels_);
    p.residual = row(input_, first);
    p.residual_row = channels_;
    if (residual_.defined()) {
      p.second_residual = row(residual_, first);
      p.second_residual_row = channels_;
    }
    return p;
  }

 private:
  int64_t offset(int64_t row) const { return row * channels_ * input_.element_size(); }
  const void* row(const at::Tensor& matrix, int64_t i) const {
    return static_cast<const std::byte*>(matrix.const_data_ptr()) + offset(i);
  }

  at::Tensor input_, residual_, output_;
  int64_t channels_, hidden_;
  RowProduct expand_, project_;
};

void run_in_chunks(const Layer& layer, const at::Tensor& input, int64_t chunks) {
  const int64_t rows = input.size(0), most = at::ceil_div(rows, chunks);
  const size_t hidden_bytes = at::round_up<int64_t>(most * layer.hidden() * input.element_size(), 64);
  size_t scratch_bytes = 0;
  for (const PackedConvForward& p : {layer.expansion(0, most, nullptr), layer.projection(0, most, nullptr)})
    scratch_bytes = std::max(scratch_bytes, packed_conv_kernel(p).scratch_bytes(p));
  parallel(at::ceil_div(rows, most), hidden_bytes + scratch_bytes, [&](int64_t begin, int64_t end, std::byte* hidden) {
    std::byte* const scratch = hidden + hidden_bytes;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * most, count = std::min(most, rows - first);
      for (const PackedConvForward& p : {layer.expansion(first, count, hidden), layer.projection(first, count, hidden)})
        packed_conv_kernel(p).run(p, 0, packed_conv_kernel(p).tasks(p), scratch);
    }
  });
}

at::Tensor run_layer(const FfnRows& rows) {
  const at::Tensor& x = rows.input;
  if (x.scalar_type() == at::kDouble) return ffn_of_products(rows, product_with_torch);
  at::Tensor output = at::empty(x.sizes(), x.options());
  const Layer layer(rows, output);
  const int64_t count = x.size(0);
  if (const int64_t chunks = chunks_of(count, layer.hidden())) {
    run_in_chunks(layer, x, chunks);
  } else {  // all threads share each product
    at::Tensor hidden = at::empty({count, layer.hidden()}, x.options());
    run_packed_conv(layer.expansion(0, count, hidden.mutable_data_ptr()));
    run_packed_conv(layer.projection(0, count, hidden.const_data_ptr()));
  }
  return output;
}

at::Tensor ffn_cpu(const FfnArguments& arguments) {
  return arguments.with(run_layer);
}

}  // namespace

MOBILEMAMBA_LIBRARY_IMPL(CPU, m) {
  m.impl("ffn", kernel_of<ffn, ffn_cpu>);
  m.impl("ffn_backward", kernel_of<ffn_backward, ffn_backward_composed>);
}

}  // namespace mobilemamba::cpu
