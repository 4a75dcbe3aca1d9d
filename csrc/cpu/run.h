// Runs a CPU kernel's tasks on torch's threads.
#pragma once

#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/team.h"

namespace mobilemamba::cpu {

template <typename Params>
void run(const Kernel<Params>& kernel, const Params& params) {
  parallel(kernel.tasks(params), kernel.scratch_bytes(params),
           [&](int64_t begin, int64_t end, std::byte* scratch) { kernel.run(params, begin, end, scratch); });
}

/// The number of parts of the batch that the gradient of a depthwise weight is split into. A task takes 64 channels of
/// one part, so 2048 channel-parts are 32 tasks, which keep the threads busy.
inline int64_t backward_weight_slabs(int64_t batch, int64_t channels) {
  return std::clamp<int64_t>(2048 / channels, 1, batch);
}

}  // namespace mobilemamba::cpu
