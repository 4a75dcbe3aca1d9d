// What the stand-in for the CUDA runtime counts in each launch; see counters.cpp. tools/kernel_counters.py builds
// the library with HOST_CUDA_COUNTERS, and test_kernel_counters.py. Then the kernels compute nothing that is right:
// copies and products are only counted, and a launch that would count the same as an earlier one does not run.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace host_cuda::counters {

/// Where the kernel called: the address in the code, and the frame of the called function.
struct Caller {
  const void *place, *frame;
};
#define HOST_CUDA_CALLER (host_cuda::counters::Caller{__builtin_return_address(0), __builtin_frame_address(0)})

#ifdef HOST_CUDA_COUNTERS
constexpr bool on = true;

/// Begins a launch, and returns the blocks that have to run. `parameters`: the bytes of the kernel's parameters.
std::vector<unsigned> blocks_to_run(const void* function, const std::string& parameters, unsigned blocks,
                                    unsigned threads, size_t shared_bytes);
void end_launch();
/// From here on the accesses are those of this thread of the block.
void begin_thread(int thread, const unsigned char* stack, size_t stack_bytes);
/// The lanes [begin, end) of a warp are at the same place again.
void meet(int begin, int end);
/// The block is at a barrier.
void barrier();
// Instructions that are no ordinary accesses.
void product(const Caller& caller);
void shuffle(const Caller& caller);
void load_matrices(const Caller& caller, const void* shared_row);
void copy_async(const Caller& caller, const void* shared, const void* global, int bytes);
#else
constexpr bool on = false;

inline std::vector<unsigned> blocks_to_run(const void*, const std::string&, unsigned, unsigned, size_t) {
  return {};
}
inline void end_launch() {}
inline void begin_thread(int, const unsigned char*, size_t) {}
inline void meet(int, int) {}
inline void barrier() {}
inline void product(const Caller&) {}
inline void shuffle(const Caller&) {}
inline void load_matrices(const Caller&, const void*) {}
inline void copy_async(const Caller&, const void*, const void*, int) {}
#endif

}  // namespace host_cuda::counters
