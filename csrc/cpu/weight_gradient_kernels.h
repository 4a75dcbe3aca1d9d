// CPU kernel of the gradient of a matrix product's weight: a product over the rows of two matrices.
#pragma once

#include "cpu/vec.h"
#include "kernels/weight_gradient.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// A task has some inputs, and all outputs. A pass sums up some outputs by the task's inputs over a block of rows, in
/// registers. Its inputs are copied one after another, which fill half of L1; the rows of the gradient are read in
/// place, because each of a pass's lines of it serves the next pass too.
struct WeightGradientKernel {
  using V = Vec<float>;
  static constexpr int most_vectors = 2, step = most_vectors * V::size;  // inputs of a task
#ifdef __aarch64__
  static constexpr int most_outputs = 8;  // of a pass; PackedConvKernel has the reasons
#else
  static constexpr int most_outputs = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 12 : 6;
#endif
  static constexpr int64_t block_rows = MOBILEMAMBA_CPU_VECTOR_BYTES == 64 ? 192 : 256;

  static int64_t tasks(const WeightGradient& p) { return ceil_div(p.inputs, step); }
  static size_t scratch_bytes(const WeightGradient&) { return block_rows * step * sizeof(float); }

  static void run(const WeightGradient& p, int64_t begin, int64_t end, std::byte* memory) {
    auto* const scratch = reinterpret_cast<float (*)[step]>(memory);
    const int64_t blocks = max(1, ceil_div(p.rows, block_rows)), size = ceil_div(p.rows, blocks);
    for (int64_t task = begin; task < end; ++task)
      for (int64_t block = 0; block < blocks; ++block)
        run_block(p, task * step, block * size, min(size, p.rows - block * size), scratch);
  }

 private:
  /// What a pass reads and writes; its inputs are from `column` on.
  struct Pass {
    int64_t rows;
    const float *input, *grad;
    int64_t grad_row;
    float* sums;
    int64_t sums_row;
    int count;  // inputs of the last vector
    bool add;
  };

  static void run_block(const WeightGradient& p, int64_t column, int64_t first, int64_t rows, float (*scratch)[step]) {
    const int columns = static_cast<int>(min(step, p.inputs - column));
    const float* from = static_cast<const float*>(p.input.data) + first * p.input.row + column;
    for (int64_t r = 0; r < rows; ++r, from += p.input.row)  // the last vector is filled up with zeros
      for (int i = 0; i < columns; i += V::size)
        store(&scratch[r][i], load(from + i, columns - i < V::size ? columns - i : V::size), V::size);
    const bool one_vector = columns <= V::size;
    for (int64_t output = 0; output < p.outputs;) {
      const int64_t left = p.outputs - output, outputs = ceil_div(left, ceil_div(left, most_outputs));  // equal passes
      const Pass pass = {.rows = rows,
                         .input = scratch[0],
                         .grad = static_cast<const float*>(p.grad.data) + first * p.grad.row + output,
                         .grad_row = p.grad.row,
                         .sums = p.sums + output * p.inputs + column,
                         .sums_row = p.inputs,
                         .count = one_vector ? columns : columns - V::size,
                         .add = p.add || first > 0};
      one_vector ? multiply<1>(static_cast<int>(outputs), pass) : multiply<2>(static_cast<int>(outputs), pass);
      output += outputs;
    }
  }

  template <int vectors, int outputs = most_outputs>
  static void multiply(int count, const Pass& pass) {
    if constexpr (outputs > 1)
      if (count < outputs) return multiply<vectors, outputs - 1>(count, pass);
    multiply_outputs<vectors, outputs>(pass);
  }

  // Unrolled early, with constant indices, so that all sums stay in registers: see PackedConvKernel.
  template <int vectors, int outputs>
  __attribute__((noinline)) static void multiply_outputs(const Pass& pass) {
    V sum[outputs][vectors];
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        sum[o][v] = pass.add ? load(pass.sums + o * pass.sums_row + v * V::size, v + 1 < vectors ? V::size : pass.count)
                             : V(0.0f);
    const float *input = pass.input, *grad = pass.grad;
    for (int64_t r = 0; r < pass.rows; ++r, grad += pass.grad_row, input += step) {
      V x[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        x[v] = load(input + v * V::size, V::size);
#pragma GCC unroll 16
      for (int o = 0; o < outputs; ++o) {
        const V g(grad[o]);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v)
          sum[o][v] = sum[o][v] + g * x[v];
      }
    }
#pragma GCC unroll 16
    for (int o = 0; o < outputs; ++o)
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v)
        store(pass.sums + o * pass.sums_row + v * V::size, sum[o][v], v + 1 < vectors ? V::size : pass.count);
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
