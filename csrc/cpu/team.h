// The threads of a parallel region on the CPU: tasks that any thread takes, and one OpenMP region around many of them.
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstddef>
#include <cstdint>

namespace mobilemamba::cpu {

/// Computes the tasks [begin, end) with scratch memory of the calling thread, 64-byte aligned.
using Body = c10::function_ref<void(int64_t begin, int64_t end, std::byte* scratch)>;

/// Computes the tasks [0, count) on torch's threads, and returns when all are done. Threads call `body` at the same
/// time, any number of times, with any ranges. In a `body`, parallel regions are serial. An exception is rethrown here.
/// Within `with_team` the team takes the tasks. Elsewhere this is at::parallel_for.
void parallel(int64_t count, size_t scratch_bytes, Body body);

/// Calls `program` on this thread. Torch's other threads stay ready for its parallel regions until it ends.
///
/// A network has some hundred parallel regions of 10 to 200 us. at::parallel_for makes each an OpenMP region, which
/// deals the tasks out beforehand and ends with a barrier, where threads spin for milliseconds. When another process
/// takes a core, the thread of that core holds up all others in each region. A team is one OpenMP region for all of
/// them. Its threads take tasks, so a thread that does not run holds up nothing, and waiting threads sleep after a
/// short spin.
///
/// Torch's own operators use one thread in `program`. Within a parallel region the team is this thread alone.
void with_team(c10::function_ref<void()> program);

}  // namespace mobilemamba::cpu
