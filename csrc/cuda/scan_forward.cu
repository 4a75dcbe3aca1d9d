// The bidirectional scan, forward; see scan.cuh for the scheme.
#include "cuda/scan.cuh"

namespace mobilemamba::cuda {
namespace {

template <typename T>
constexpr ScanShape shape = scan_forward_shape(sizeof(T) == 8);

template <typename T, bool one_state>
__global__ void __launch_bounds__(warp_size* shape<T>.max_warps)
    scan_forward_kernel(const __grid_constant__ ScanForward p, const __grid_constant__ ScanLaunch launch, Pass pass) {
  using Acc = typename AccumulateOf<T>::type;
  constexpr int chunk_length = shape<T>.chunk_length;
  const int lane = threadIdx.x, warp = threadIdx.y, warps = launch.warps;
  Acc* const shared = reinterpret_cast<Acc*>(shared_memory);
  Acc* handed = shared + warps * launch.staged;  // two buffers (warps, 2 values, 32)
  const auto at = [&](int w, int value) -> Acc& { return handed[(w * 2 + value) * warp_size + lane]; };
  const int64_t states = one_state ? 1 : p.state;
  int turn = 0;

  for (int64_t task = blockIdx.x; task < launch.tasks; task += gridDim.x) {
    const Chunk<T, chunk_length> chunk(p, launch, task, shared + warp * launch.staged);
    Acc u[chunk_length], y[chunk_length];
    chunk.load(p.u, p.u_batch, p.u_position, u);
    chunk.stage_together();
    const Acc skip = chunk.parameter(p.D, 0, 0, 1) + chunk.parameter(p.D, 1, 0, 1);
#pragma unroll
    for (int t = 0; t < chunk_length; ++t)
      y[t] = skip * u[t];

#pragma unroll
    for (int direction = 0; direction < 2; ++direction) {
      Acc dt[chunk_length];
      chunk.step_sizes(direction, dt);
      for (int64_t n = 0; n < states; ++n) {
        const Acc A = rate_of<T>(-exp(chunk.parameter(p.A_log, direction, n, states)));
        const auto [b, c] = chunk.B_and_C(direction, n);
        Acc reach[chunk_length];  // d y / d carry
        Acc state = Acc(0), decay = Acc(1);
#pragma unroll
        for (int i = 0; i < chunk_length; ++i) {
          const int t = chunk.visited(direction, i);
          const Acc step_decay = chunk.decay(t, dt[t], A);
          state = scan_step(state, step_decay, dt[t] * u[t], b[t]);
          decay *= step_decay;
          y[t] += c[t] * state;
          reach[t] = c[t] * decay;
        }
        // Two buffers alternate, so that one barrier suffices: no warp writes the buffer that another still reads.
        handed = shared + warps * (launch.staged + turn * 2 * warp_size);
        turn = 1 - turn;
        at(warp, 0) = decay;
        at(warp, 1) = state;
        __syncthreads();
        if (pass == Pass::collect) {
          if (warp == 0 && chunk.active) {
            state = Acc(0);
            decay = Acc(1);
            for (int i = 0; i < warps; ++i) {
              const int w = direction == 0 ? i : warps - 1 - i;
              state = at(w, 0) * state + at(w, 1);
              decay *= at(w, 0);
            }
            Acc* to = handed_on<Acc>(p, launch, 2, chunk.batch, chunk.segment, direction, n) + chunk.channel;
            to[0] = decay;
            to[p.channels] = state;
          }
          continue;
        }
        Acc incoming = Acc(0);
        if (pass == Pass::finish)
          incoming = handed_on<Acc>(p, launch, 2, chunk.batch, chunk.segment, direction, n)[p.channels + chunk.channel];
        if (direction == 0)
          for (int w = 0; w < warp; ++w)
            incoming = at(w, 0) * incoming + at(w, 1);
        else
          for (int w = warps - 1; w > warp; --w)
            incoming = at(w, 0) * incoming + at(w, 1);
#pragma unroll
        for (int t = 0; t < chunk_length; ++t)
          y[t] += reach[t] * incoming;
      }
    }
    if (pass != Pass::collect) chunk.store(p.y, y);
  }
}

}  // namespace

size_t scan_forward_scratch_bytes(const ScanForward& p) {
  return scan_scratch_bytes(p, scan_forward_launch(p), 2);
}

cudaError_t scan_forward(const ScanForward& p, cudaStream_t stream) {
  return for_type(p.dtype, [&]<typename T>() {
    const auto kernel = p.state == 1 ? scan_forward_kernel<T, true> : scan_forward_kernel<T, false>;
    return launch_scan<typename AccumulateOf<T>::type>(kernel, p, scan_forward_launch(p), 2, stream);
  });
}

}  // namespace mobilemamba::cuda
