// CPU kernels of the bidirectional scan. A vector holds neighbouring channels and walks along the sequence.
#pragma once

#include "cpu/vec.h"
#include "kernels/scan.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// Delta, B and C of one batch entry, as (2, L, R + 2N) in the accumulator type.
template <typename T, typename Acc>
void pack_rows(const ScanForward& p, int64_t batch, Acc* packed) {
  const ScanRows* rows[3] = {&p.delta, &p.B, &p.C};
  const int64_t counts[3] = {p.rank, p.state, p.state};
  for (int64_t k = 0; k < 2; ++k)
    for (int64_t t = 0; t < p.length; ++t)
      for (int i = 0; i < 3; ++i) {
        const T* from = static_cast<const T*>(rows[i]->data) + batch * rows[i]->batch + k * rows[i]->direction +
                        t * rows[i]->position;
        for (int64_t row = 0; row < counts[i]; ++row)
          *packed++ = load_one<Acc>(from + row * rows[i]->row);
      }
}

/// The parameters of one direction for one vector of channels.
template <typename Acc>
struct ChannelParams {
  using V = Vec<Acc>;
  const Acc *weight, *A_log;
  int64_t channels, rank;
  int count;
  V bias, D;

  ChannelParams(const ScanForward& p, int64_t k, int64_t channel, int count)
      : weight(static_cast<const Acc*>(p.dt_weight) + k * p.rank * p.channels + channel),
        A_log(static_cast<const Acc*>(p.A_log) + k * p.state * p.channels + channel),
        channels(p.channels),
        rank(p.rank),
        count(count),
        bias(load(static_cast<const Acc*>(p.dt_bias) + k * p.channels + channel, count)),
        D(load(static_cast<const Acc*>(p.D) + k * p.channels + channel, count)) {}

  V W(int64_t r) const { return load(weight + r * channels, count); }
  V A(int64_t n) const { return -exp(load(A_log + n * channels, count)); }
  /// dt before softplus, at `positions` positions whose rows are `row` elements apart.
  template <int positions = 1>
  MOBILEMAMBA_HOST_DEVICE void step_size(const Acc* rows, int64_t row, V* x) const {
    V sum[positions];
    for (int i = 0; i < positions; ++i)
      sum[i] = bias;
    for (int64_t r = 0; r < rank; ++r) {
      const V w = W(r);
      for (int i = 0; i < positions; ++i)
        sum[i] = sum[i] + w * rows[i * row + r];
    }
    for (int i = 0; i < positions; ++i)
      x[i] = sum[i];
  }
  V step_size(const Acc* rows) const {
    V x;
    step_size(rows, 0, &x);
    return x;
  }
};

constexpr int64_t forward_channels_per_task = 32;
/// Positions of a block; see run_states.
constexpr int64_t forward_positions = 32;

template <typename T>
struct ScanForwardKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;

  static size_t scratch_bytes(const ScanForward& p) {
    const size_t rows = ceil_div(2 * p.length * p.rows(), V::size);
    return (rows + p.length + 2 * p.state) * sizeof(V);
  }

  static int64_t tasks(const ScanForward& p) { return p.batch * ceil_div(p.channels, forward_channels_per_task); }

  static void run(const ScanForward& p, int64_t begin, int64_t end, std::byte* scratch) {
    V* y_first = reinterpret_cast<V*>(scratch);  // (L): y of direction 0
    V *h = y_first + p.length, *A = h + p.state;
    Acc* rows = reinterpret_cast<Acc*>(A + p.state);
    const int64_t blocks = ceil_div(p.channels, forward_channels_per_task);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / blocks, first = task % blocks * forward_channels_per_task;
      if (packed != batch) pack_rows<T>(p, packed = batch, rows);
      const int64_t last = min(first + forward_channels_per_task, p.channels);
      for (int64_t c = first; c < last; c += V::size) {
        const int count = static_cast<int>(min(V::size, last - c));
        if (count == V::size)
          run_channels(p, batch, c, V::size, rows, y_first, h, A);
        else
          run_channels(p, batch, c, count, rows, y_first, h, A);
      }
    }
  }

  __attribute__((always_inline)) static void run_channels(const ScanForward& p, int64_t batch, int64_t c, int count,
                                                          const Acc* rows, V* y_first, V* h, V* A) {
    if (p.state == 1)
      run_states(p, batch, c, count, rows, y_first, h, A, 1);
    else
      run_states(p, batch, c, count, rows, y_first, h, A, p.state);
  }

  /// Each step of the formula runs over a block of positions before the next step. Only the states depend on the
  /// position before; the other steps of all positions are independent, and the processor overlaps them. Position by
  /// position it overlaps two: a vector took 110 to 145 cycles, and takes 63 to 69 in blocks of 32
  /// (benchmarks/NOTES.md).
  __attribute__((always_inline)) static void run_states(const ScanForward& p, int64_t batch, int64_t c, int count,
                                                        const Acc* rows, V* y_first, V* h, V* A, int64_t state) {
    const T* u = static_cast<const T*>(p.u) + batch * p.u_batch + c;
    T* y = static_cast<T*>(p.y) + batch * p.length * p.channels + c;
    for (int64_t k = 0; k < 2; ++k) {
      const ChannelParams<Acc> params(p, k, c, count);
      for (int64_t n = 0; n < state; ++n) {
        h[n] = V(Acc(0));
        A[n] = params.A(n);
      }
      for (int64_t begin = 0; begin < p.length; begin += forward_positions) {
        const int64_t size = min(forward_positions, p.length - begin);
        const auto position = [&](int64_t i) { return k == 0 ? begin + i : p.length - 1 - begin - i; };
        const int64_t next = k == 0 ? p.rows() : -p.rows();
        const Acc* first = rows + (k * p.length + position(0)) * p.rows();
        const auto row = [&](int64_t i) { return first + i * next; };
        V x[forward_positions], dt[forward_positions], dt_u[forward_positions], y_k[forward_positions];
        int64_t done = 0;
        for (; done + 4 <= size; done += 4)
          params.template step_size<4>(row(done), next, x + done);
        for (; done < size; ++done)
          x[done] = params.step_size(row(done));
        for (int64_t i = 0; i < size; ++i)
          dt[i] = softplus(x[i]);
        for (int64_t i = 0; i < size; ++i) {
          const V u_t = load(u + position(i) * p.u_position, count);
          dt_u[i] = dt[i] * u_t;
          y_k[i] = params.D * u_t;
        }
        for (int64_t n = 0; n < state; ++n) {
          V decay[forward_positions];
          for (int64_t i = 0; i < size; ++i)
            decay[i] = exp_nonpositive(dt[i] * A[n]);
          const int64_t b = p.rank + n, c_n = b + state;
          V h_n = h[n];
          for (int64_t i = 0; i < size; ++i) {
            h_n = scan_step(h_n, decay[i], dt_u[i], row(i)[b]);
            y_k[i] = y_k[i] + h_n * row(i)[c_n];
          }
          h[n] = h_n;
        }
        for (int64_t i = 0; i < size; ++i) {
          const int64_t t = position(i);
          if (k == 0)
            y_first[t] = y_k[i];
          else
            store(y + t * p.channels, y_first[t] + y_k[i], count);
        }
      }
    }
  }
};

/// Positions of a chunk in the backward pass. All states of one chunk are in memory at a time; of the other chunks only
/// the states at the seam, which is the beginning of a chunk.
constexpr int64_t chunk_length = 64;

template <typename T>
struct ScanBackwardKernel {
  using Acc = typename AccumulateOf<T>::type;
  using V = Vec<Acc>;
  static constexpr int64_t vectors_per_group = scan_group_channels / V::size;

  /// The values of one vector of channels that are kept from chunk to chunk.
  struct Channels {
    V* seams;        // (chunks, N): h before each chunk
    V* A;            // (N)
    V* carry;        // (N): dL/dh from the later chunks
    V* grad_A;       // (N)
    V* grad_weight;  // (R)
    V grad_bias, grad_D;
  };

  /// The arrays in a task's scratch memory.
  struct Scratch {
    Acc* rows;     // (2, L, R + 2N)
    V* grad_u;     // (vectors, L): of direction 0
    V *x, *dt;     // (chunk): step size before softplus, later softplus' derivative there; and after softplus
    V* grad_x;     // (chunk)
    V *h, *decay;  // (chunk + 1, N): h before the position; (chunk, N): the decay there
    V* grad_rows;  // (chunk, R + 2N): summed over the vectors of a group
    Channels channels[vectors_per_group];
    size_t bytes;

    Scratch(const ScanBackward& p, std::byte* memory) : bytes(0) {
      const auto take = [&](int64_t vectors) {
        V* piece = reinterpret_cast<V*>(reinterpret_cast<uintptr_t>(memory) + bytes);  // memory may be null
        bytes += vectors * sizeof(V);
        return piece;
      };
      rows = reinterpret_cast<Acc*>(take(ceil_div(2 * p.length * p.rows(), V::size)));
      grad_u = take(vectors_per_group * p.length);
      x = take(chunk_length);
      dt = take(chunk_length);
      grad_x = take(chunk_length);
      h = take((chunk_length + 1) * p.state);
      decay = take(chunk_length * p.state);
      grad_rows = take(chunk_length * p.rows());
      for (Channels& c : channels) {
        c.seams = take(ceil_div(p.length, chunk_length) * p.state);
        c.A = take(p.state);
        c.carry = take(p.state);
        c.grad_A = take(p.state);
        c.grad_weight = take(p.rank);
      }
    }
  };

  static size_t scratch_bytes(const ScanBackward& p) { return Scratch(p, nullptr).bytes; }

  static int64_t tasks(const ScanBackward& p) { return p.batch * p.groups(); }

  static void run(const ScanBackward& p, int64_t begin, int64_t end, std::byte* memory) {
    Scratch scratch(p, memory);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / p.groups();
      if (packed != batch) pack_rows<T>(p, packed = batch, scratch.rows);
      for (int64_t k = 0; k < 2; ++k)
        run_direction(p, scratch, batch, task % p.groups(), k);
    }
  }

  static void run_direction(const ScanBackward& p, Scratch& s, int64_t batch, int64_t group, int64_t k) {
    const int64_t first = group * scan_group_channels;
    const int64_t last = min(first + scan_group_channels, p.channels);
    const int64_t chunks = ceil_div(p.length, chunk_length);
    Acc* grad_rows = static_cast<Acc*>(p.grad_rows) + ((batch * p.groups() + group) * 2 + k) * p.length * p.rows();

    for (int64_t v = 0, c = first; c < last; ++v, c += V::size) {
      const int count = static_cast<int>(min(V::size, last - c));
      if (count == V::size)
        start(p, s, s.channels[v], batch, k, c, V::size);
      else
        start(p, s, s.channels[v], batch, k, c, count);
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * chunk_length, length = min(chunk_length, p.length - begin);
      for (int64_t i = 0; i < length * p.rows(); ++i)
        s.grad_rows[i] = V(Acc(0));
      // The gradients of the rows are sums over channels. The vectors of the group are added first, lane by lane; the
      // lanes of their sum are added once.
      for (int64_t v = 0, c = first; c < last; ++v, c += V::size) {
        const int count = static_cast<int>(min(V::size, last - c));
        if (count == V::size && p.state == 1)
          run_chunk(p, s, v, batch, k, c, V::size, chunk, length, 1);
        else
          run_chunk(p, s, v, batch, k, c, count, chunk, length, p.state);
      }
      for (int64_t row = 0; row < p.rows(); ++row)
        for (int64_t i = 0; i < length; ++i)
          grad_rows[row * p.length + position(p, k, begin + i)] = sum(s.grad_rows[i * p.rows() + row]);
    }
    for (int64_t v = 0, c = first; c < last; ++v, c += V::size)
      finish(p, s.channels[v], batch, k, c, static_cast<int>(min(V::size, last - c)));
  }

  /// The i-th position that direction k visits.
  static int64_t position(const ScanForward& p, int64_t k, int64_t i) { return k == 0 ? i : p.length - 1 - i; }

  /// Loads the parameters, clears the sums, and computes the states at the seams.
  __attribute__((always_inline)) static void start(const ScanBackward& p, Scratch& s, Channels& channels, int64_t batch,
                                                   int64_t k, int64_t c, int count) {
    const ChannelParams<Acc> params(p, k, c, count);
    channels.grad_bias = channels.grad_D = V(Acc(0));
    for (int64_t r = 0; r < p.rank; ++r)
      channels.grad_weight[r] = V(Acc(0));
    for (int64_t n = 0; n < p.state; ++n) {
      channels.A[n] = params.A(n);
      channels.carry[n] = channels.grad_A[n] = channels.seams[n] = V(Acc(0));
    }
    for (int64_t chunk = 0; (chunk + 1) * chunk_length < p.length; ++chunk) {
      V* const seam = channels.seams + chunk * p.state;
      compute_states(p, s, params, channels.A, seam, batch, k, c, count, chunk * chunk_length, chunk_length, p.state);
      for (int64_t n = 0; n < p.state; ++n)
        seam[p.state + n] = s.h[chunk_length * p.state + n];
    }
  }

  /// Step sizes, decays and states of the `length` positions that direction k visits from the one at `begin` on, where
  /// the states are `h`. Each step of the formula runs over all positions before the next step, as in the forward
  /// pass: only the states depend on the position before.
  __attribute__((always_inline)) static void compute_states(const ScanBackward& p, Scratch& s,
                                                            const ChannelParams<Acc>& params, const V* A, const V* h,
                                                            int64_t batch, int64_t k, int64_t c, int count,
                                                            int64_t begin, int64_t length, int64_t state) {
    const T* u = static_cast<const T*>(p.u) + batch * p.u_batch + c;
    const Acc* const first = s.rows + (k * p.length + position(p, k, begin)) * p.rows();
    const int64_t next = k == 0 ? p.rows() : -p.rows();
    int64_t done = 0;
    for (; done + 4 <= length; done += 4)
      params.template step_size<4>(first + done * next, next, s.x + done);
    for (; done < length; ++done)
      s.x[done] = params.step_size(first + done * next);
    for (int64_t i = 0; i < length; ++i)
      s.dt[i] = softplus(s.x[i]);
    for (int64_t n = 0; n < state; ++n) {
      V h_n = h[n];
      for (int64_t i = 0; i < length; ++i)
        s.decay[i * state + n] = exp_nonpositive(s.dt[i] * A[n]);
      for (int64_t i = 0; i < length; ++i) {
        s.h[i * state + n] = h_n;
        const V dt_u = s.dt[i] * load(u + position(p, k, begin + i) * p.u_position, count);
        h_n = scan_step(h_n, s.decay[i * state + n], dt_u, first[i * next + p.rank + n]);
      }
      s.h[length * state + n] = h_n;
    }
  }

  /// Recomputes the states of one chunk, then takes its positions from the last to the first.
  __attribute__((always_inline)) static void run_chunk(const ScanBackward& p, Scratch& s, int64_t v, int64_t batch,
                                                       int64_t k, int64_t c, int count, int64_t chunk, int64_t length,
                                                       int64_t state) {
    Channels& channels = s.channels[v];
    const ChannelParams<Acc> params(p, k, c, count);
    const int64_t begin = chunk * chunk_length;
    const T* u = static_cast<const T*>(p.u) + batch * p.u_batch + c;
    const T* grad_y = static_cast<const T*>(p.grad_y) + batch * p.grad_y_batch + c;
    T* grad_u = static_cast<T*>(p.grad_u) + batch * p.length * p.channels + c;
    const auto row_of = [&](int64_t i) { return s.rows + (k * p.length + position(p, k, begin + i)) * p.rows(); };

    compute_states(p, s, params, channels.A, channels.seams + chunk * state, batch, k, c, count, begin, length, state);
    for (int64_t i = 0; i < length; ++i)
      s.x[i] = sigmoid(s.x[i]);
    for (int64_t i = length - 1; i >= 0; --i) {
      const int64_t t = position(p, k, begin + i);
      const Acc *b_row = row_of(i) + p.rank, *c_row = b_row + state;
      V* grad_rows = s.grad_rows + i * p.rows();
      const V u_t = load(u + t * p.u_position, count), grad_y_t = load(grad_y + t * p.grad_y_position, count);
      ScanStepGradient<V> grad = {params.D * grad_y_t, V(Acc(0))};
      for (int64_t n = 0; n < state; ++n) {
        V grad_B, grad_C;
        scan_step_backward(channels.carry[n], grad, channels.grad_A[n], grad_y_t, s.h[i * state + n],
                           s.decay[i * state + n], s.dt[i], u_t, channels.A[n], b_row[n], c_row[n], grad_B, grad_C);
        grad_rows[p.rank + n] = grad_rows[p.rank + n] + first_lanes(grad_B, count);
        grad_rows[p.rank + state + n] = grad_rows[p.rank + state + n] + first_lanes(grad_C, count);
      }
      s.grad_x[i] = first_lanes(grad.dt * s.x[i], count);
      channels.grad_bias = channels.grad_bias + s.grad_x[i];
      channels.grad_D = channels.grad_D + grad_y_t * u_t;
      if (k == 0)
        s.grad_u[v * p.length + t] = grad.u;
      else
        store(grad_u + t * p.channels, s.grad_u[v * p.length + t] + grad.u, count);
    }
    int64_t done = 0;
    for (; done + 4 <= length; done += 4)
      add_step_sizes<4>(p, s, params, channels, row_of(done), k, done);
    for (; done < length; ++done)
      add_step_sizes<1>(p, s, params, channels, row_of(done), k, done);
  }

  /// Gradients of delta and dt_weight at `positions` positions, which share each load of a weight.
  template <int positions>
  __attribute__((always_inline)) static void add_step_sizes(const ScanBackward& p, Scratch& s,
                                                            const ChannelParams<Acc>& params, Channels& channels,
                                                            const Acc* row, int64_t k, int64_t i) {
    const int64_t next = k == 0 ? p.rows() : -p.rows();
    V grad_x[positions];
    for (int j = 0; j < positions; ++j)
      grad_x[j] = s.grad_x[i + j];
    for (int64_t r = 0; r < p.rank; ++r) {
      const V w = params.W(r);
      V sum = channels.grad_weight[r];
      for (int j = 0; j < positions; ++j) {
        V& grad_row = s.grad_rows[(i + j) * p.rows() + r];
        sum = sum + grad_x[j] * row[j * next + r];
        grad_row = grad_row + w * grad_x[j];
      }
      channels.grad_weight[r] = sum;
    }
  }

  static void finish(const ScanBackward& p, const Channels& channels, int64_t batch, int64_t k, int64_t c, int count) {
    Acc* out = static_cast<Acc*>(p.grad_params) + (batch * 2 + k) * (p.rank + 2 + p.state) * p.channels + c;
    const auto put = [&](V x) {
      store(out, x, count);
      out += p.channels;
    };
    for (int64_t n = 0; n < p.state; ++n)
      put(channels.grad_A[n] * channels.A[n]);  // A = -exp(A_log)
    for (int64_t r = 0; r < p.rank; ++r)
      put(channels.grad_weight[r]);
    put(channels.grad_bias);
    put(channels.grad_D);
  }
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
