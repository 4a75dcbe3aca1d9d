// The stand-in for the CUDA runtime; see include/cuda_runtime_api.h. The environment has its settings:
//   HOST_CUDA_SEED          seed of the order of threads
//   HOST_CUDA_BLOCKS        most blocks of a grid; a library that counts launches the whole grid
//   HOST_CUDA_SHARED_LIMIT  bytes of shared memory that a block may have
//   HOST_CUDA_ERROR         error code that every launch returns without running
//   HOST_CUDA_ONLY_COUNT    not 0: launches are counted and do not run
#include <cuda_runtime.h>
#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "counters.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace mobilemamba::cuda {
constexpr size_t shared_capacity = 227 * 1024;
alignas(128) extern unsigned char shared_memory[];
alignas(128) unsigned char shared_memory[shared_capacity];
}  // namespace mobilemamba::cuda

namespace mobilemamba {
// The test library registers its kernels over those of the package, which is loaded first.
bool first_copy() {
  return true;
}
}  // namespace mobilemamba

namespace host_cuda {
namespace {

using mobilemamba::cuda::shared_capacity, mobilemamba::cuda::shared_memory;

constexpr size_t stack_bytes = 256 * 1024;
constexpr int warp_size = 32, most_threads = 1024;

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

enum class State { ready, at_shuffle, at_warp_barrier, at_block_barrier, done };

struct Thread {
  State state;
  dim3 index;
  int turn;  // which of the warp's two exchange buffers is next
  void* stack_pointer;
  unsigned char* stack;
  struct Copy {
    void* shared;
    const void* global;
    int bytes;
  };
  std::deque<std::vector<Copy>> copies;  // groups; the last one is open
};

struct Scheduler {
  std::mutex mutex;  // one launch at a time
  std::mt19937 random{static_cast<unsigned>(setting("HOST_CUDA_SEED", 0))};
  std::vector<Thread> threads;
  std::map<const void*, size_t> granted;  // bytes of shared memory that a kernel has asked for
  Thread* running;
  void* stack_pointer;
  const std::function<void()>* kernel;
  uint64_t places[most_threads / warp_size][2][3][warp_size];

  Scheduler() {
    threads.resize(most_threads);
    for (Thread& thread : threads)
      thread.stack = static_cast<unsigned char*>(std::aligned_alloc(64, stack_bytes));
  }
};

Scheduler& scheduler() {
  static Scheduler& instance = *new Scheduler;
  return instance;
}

/// Saves the callee-saved registers and the stack pointer in `from`, and continues where `to` was saved.
extern "C" void host_cuda_switch(void** from, void* to);
asm(R"(
.text
.globl host_cuda_switch
.hidden host_cuda_switch
.type host_cuda_switch, @function
host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size host_cuda_switch, . - host_cuda_switch
)");

/// Returns to the scheduler until it runs this thread again.
void pause(State state) {
  Scheduler& s = scheduler();
  Thread& thread = *s.running;
  thread.state = state;
  host_cuda_switch(&thread.stack_pointer, s.stack_pointer);
}

void thread_main() {
  (*scheduler().kernel)();
  pause(State::done);
}

void start(Thread& thread) {
  thread.state = State::ready;
  thread.turn = 0;
  thread.copies.assign(1, {});
  ASAN_UNPOISON_MEMORY_REGION(thread.stack, stack_bytes);
  void** top = reinterpret_cast<void**>(thread.stack + stack_bytes) - 3;  // aligned as after a call
  *top = nullptr;
  *--top = reinterpret_cast<void*>(thread_main);
  thread.stack_pointer = top - 6;
}

void run(Thread& thread) {
  Scheduler& s = scheduler();
  s.running = &thread;
  threadIdx = thread.index;
  counters::begin_thread(static_cast<int>(&thread - s.threads.data()), thread.stack, stack_bytes);
  host_cuda_switch(&s.stack_pointer, thread.stack_pointer);
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "host_cuda: %s\n", what);
  std::abort();
}

/// Runs the threads [begin, end) of a warp until all are at a block barrier or all are done.
void run_warp(int begin, int end) {
  Scheduler& s = scheduler();
  std::vector<int> order(end - begin);
  for (int i = begin; i < end; ++i)
    order[i - begin] = i;
  const auto all = [&](State state) {
    return std::all_of(order.begin(), order.end(), [&](int i) { return s.threads[i].state == state; });
  };
  for (;;) {
    std::shuffle(order.begin(), order.end(), s.random);
    for (int i : order)
      if (s.threads[i].state == State::ready) run(s.threads[i]);
    counters::meet(begin, end);
    if (all(State::at_block_barrier) || all(State::done)) return;
    if (!all(State::at_warp_barrier) && !all(State::at_shuffle))
      fail("the lanes of a warp do not meet at the same barrier");
    for (int i : order)
      s.threads[i].state = State::ready;
  }
}

void run_block(int count) {
  Scheduler& s = scheduler();
  for (int i = 0; i < count; ++i)
    start(s.threads[i]);
  std::vector<int> warps((count + warp_size - 1) / warp_size);
  for (size_t w = 0; w < warps.size(); ++w)
    warps[w] = static_cast<int>(w);
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), s.random);
    for (int w : warps)
      run_warp(w * warp_size, std::min(count, (w + 1) * warp_size));
    const auto done = std::count_if(s.threads.begin(), s.threads.begin() + count,
                                    [](const Thread& thread) { return thread.state == State::done; });
    if (done == count) return;
    if (done != 0) fail("some threads end while others wait at __syncthreads");
    counters::barrier();
    for (int i = 0; i < count; ++i)
      s.threads[i].state = State::ready;
  }
}

}  // namespace

/// Launches so far, for tests that load this library.
extern "C" __attribute__((visibility("default"))) int host_cuda_launches;
int host_cuda_launches = 0;

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, const std::function<void()>& kernel,
                   const std::string& parameters) {
  ++host_cuda_launches;
  if (setting("HOST_CUDA_ONLY_COUNT", 0)) return cudaSuccess;
  if (const int error = setting("HOST_CUDA_ERROR", 0)) return static_cast<cudaError_t>(error);
  Scheduler& s = scheduler();
  const std::lock_guard lock(s.mutex);
  const unsigned count = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  int limit = 0;
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const size_t granted = s.granted.count(function) ? s.granted[function] : 48 * 1024;
  if (config.stream != current_stream || config.dynamicSmemBytes > granted || count == 0 || count > most_threads ||
      config.gridDim.x == 0 || config.gridDim.y != 1 || config.gridDim.z != 1 ||
      config.dynamicSmemBytes > static_cast<size_t>(limit))
    return cudaErrorInvalidValue;
  s.kernel = &kernel;
  blockDim = config.blockDim;
  gridDim = dim3(std::min<unsigned>(config.gridDim.x, setting("HOST_CUDA_BLOCKS", 3)));
  for (unsigned i = 0; i < count; ++i)
    s.threads[i].index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
  std::vector<unsigned> blocks;
  if (counters::on) {
    gridDim = config.gridDim;
    blocks = counters::blocks_to_run(function, parameters, gridDim.x, count, config.dynamicSmemBytes);
  } else {
    blocks.resize(gridDim.x);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), s.random);
  }
  for (unsigned block : blocks) {
    blockIdx = dim3(block, 0, 0);
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, shared_capacity);
    std::memset(shared_memory, 0xff, shared_capacity);
    ASAN_POISON_MEMORY_REGION(shared_memory + config.dynamicSmemBytes, shared_capacity - config.dynamicSmemBytes);
    run_block(static_cast<int>(count));
  }
  counters::end_launch();
  return cudaSuccess;
}

const uint64_t (&gather(const uint64_t (&words)[3]))[3][warp_size] {
  Scheduler& s = scheduler();
  Thread& thread = *s.running;
  const int number = static_cast<int>(&thread - s.threads.data()), lane = number % warp_size;
  // Two buffers alternate: a lane can be one exchange ahead of another, but not two.
  auto& place = s.places[number / warp_size][thread.turn];
  thread.turn = 1 - thread.turn;
  for (int i = 0; i < 3; ++i)
    place[i][lane] = words[i];
  pause(State::at_shuffle);
  return place;
}

uint64_t exchange(unsigned lanes, uint64_t bits, int mask) {
  if (lanes != 0xffffffff) fail("a shuffle that not all lanes take part in");
  counters::shuffle(HOST_CUDA_CALLER);
  return gather({bits, 0, 0})[0][threadIdx.x % warp_size ^ mask];
}

void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes < 0 || bytes > 16)
    fail("an asynchronous copy that is not of aligned 16 bytes");
  counters::copy_async(HOST_CUDA_CALLER, shared, global, bytes);
  if (counters::on) return;
  scheduler().running->copies.back().push_back({shared, global, bytes});
}

void commit_copies() {
  scheduler().running->copies.emplace_back();
}

void wait_for_copies(int groups) {
  auto& copies = scheduler().running->copies;
  for (; static_cast<int>(copies.size()) > groups + 1; copies.pop_front())
    for (const Thread::Copy& copy : copies.front()) {
      std::memset(copy.shared, 0, 16);
      std::memcpy(copy.shared, copy.global, copy.bytes);
    }
}

void count_product() {
  counters::product(HOST_CUDA_CALLER);
}

void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16) fail("a row of a matrix that is not aligned to 16 bytes");
  counters::load_matrices(HOST_CUDA_CALLER, shared_row);
  if (counters::on) return;
  const auto& rows = gather({reinterpret_cast<uintptr_t>(shared_row), 0, 0})[0];
  const int lane = threadIdx.x % warp_size;
  for (int i = 0; i < 4; ++i)
    std::memcpy(&to[i], reinterpret_cast<const unsigned char*>(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}

}  // namespace host_cuda

void __syncthreads() {
  host_cuda::pause(host_cuda::State::at_block_barrier);
}

void __syncwarp() {
  host_cuda::pause(host_cuda::State::at_warp_barrier);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 12
           : attribute == cudaDevAttrComputeCapabilityMinor ? 1
                                                            : host_cuda::setting("HOST_CUDA_SHARED_LIMIT", 227 * 1024);
  return cudaSuccess;
}

/// Calls of cudaFuncSetAttribute, for a test.
extern "C" __attribute__((visibility("default"))) int host_cuda_attributes_set;
int host_cuda_attributes_set = 0;

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  host_cuda::Scheduler& s = host_cuda::scheduler();
  const std::lock_guard lock(s.mutex);
  s.granted[function] = static_cast<size_t>(value);
  ++host_cuda_attributes_set;
  return cudaSuccess;
}
