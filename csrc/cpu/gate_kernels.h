// CPU kernel of the gate behind the scan. A vector holds neighbouring channels of one row.
#pragma once

#include "cpu/vec.h"
#include "kernels/gate.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

template <typename T>
struct GateForwardKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;
  static constexpr int64_t task_rows = 4;  // 2 to 4 us: 16 positions still are tasks for four threads

  static int64_t tasks(const GateForward& p) { return ceil_div(p.rows, task_rows); }
  static size_t scratch_bytes(const GateForward& p) { return ceil_div(p.channels, V::size) * sizeof(V); }

  static void run(const GateForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    V* values = reinterpret_cast<V*>(scratch);
    for (int64_t row = begin * task_rows; row < min(end * task_rows, p.rows); ++row)
      run_row(p, row, values);
  }

  static int left(const GateForward& p, int64_t c) { return static_cast<int>(min(V::size, p.channels - c)); }

  static void run_row(const GateForward& p, int64_t row, V* values) {
    const T* y = static_cast<const T*>(p.y) + row * p.channels;
    const T* z = static_cast<const T*>(p.z) + row * p.z_row;
    const Acc *weight = static_cast<const Acc*>(p.weight), *bias = static_cast<const Acc*>(p.bias);
    T* output = static_cast<T*>(p.output) + row * p.channels;

    V total = V(Acc(0));
    for (int64_t c = 0, i = 0; c < p.channels; c += V::size, ++i)
      total = total + (values[i] = load_channels(y, c, left(p, c)));
    const Acc mean = sum(total) / static_cast<Acc>(p.channels);
    V squares = V(Acc(0));
    for (int64_t c = 0, i = 0; c < p.channels; c += V::size, ++i) {
      values[i] = first_lanes(values[i] - mean, left(p, c));
      squares = squares + values[i] * values[i];
    }
    const Acc variance = sum(squares) / static_cast<Acc>(p.channels);
    const Acc scale = Acc(1) / sqrt(variance + static_cast<Acc>(p.eps));
    int64_t c = 0;
    for (; c + V::size <= p.channels; c += V::size)
      write(weight + c, bias + c, z + c, output + c, values[c / V::size] * scale, V::size);
    if (c < p.channels) write(weight + c, bias + c, z + c, output + c, values[c / V::size] * scale, left(p, c));
  }

 private:
  static V load_channels(const T* from, int64_t c, int count) {
    return count == V::size ? load(from + c, V::size) : load(from + c, count);
  }

  __attribute__((always_inline)) static void write(const Acc* weight, const Acc* bias, const T* z, T* output,
                                                   V normalized, int count) {
    store(output, gate(normalized, load(weight, count), load(bias, count), load(z, count)), count);
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
