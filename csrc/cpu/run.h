// Runs a CPU kernel's tasks on torch's threads.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include "cpu/kernels.h"

namespace mobilemamba::cpu {

template <typename Params>
void run(const Kernel<Params>& kernel, const Params& params) {
  at::parallel_for(0, kernel.tasks(params), 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(kernel.scratch_bytes(params));  // 64-byte aligned
    kernel.run(params, begin, end, static_cast<std::byte*>(scratch.get()));
  });
}

}  // namespace mobilemamba::cpu
