// The threads of a parallel region; see the header.
#include "cpu/team.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace mobilemamba::cpu {
namespace {

using Clock = std::chrono::steady_clock;

/// How long a thread spins before it sleeps. A worker waits for the next region, which begins after 1 to 20 us; to wake
/// it takes about 50 us. The caller waits for the tasks in flight. They take about as long as its own last one, unless
/// their thread does not run; it may need this core.
constexpr auto worker_spin = std::chrono::microseconds(100), caller_spin = std::chrono::microseconds(30);

/// A wait is a stall if it is longer than this and than the caller's own part of the region.
constexpr auto stall = std::chrono::microseconds(300);

void relax() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Spins until `done()`, at most for about `limit`; returns whether it is done.
template <typename Done>
bool spin(Clock::duration limit, Done done) {
  const auto start = Clock::now();
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      relax();
    }
  } while (Clock::now() - start < limit);
  return done();
}

/// What a calling thread knows of the competition for the cores. A worker that does not run in the middle of a task
/// stalls the caller for a time slice, some ms, while the caller alone would take twice as long as with one worker. So
/// after a stall the caller works alone: for 4 ms, and for twice as long after each further stall, up to a second, so
/// that its trials cost little. If there was none for a while, the next one counts as the first.
class Competition {
 public:
  bool works_alone() const { return Clock::now() < until_; }

  void stalled() {
    const auto now = Clock::now();
    const bool again = now - until_ < period_ + std::chrono::milliseconds(50);
    period_ = again ? std::min(2 * period_, longest) : shortest;
    until_ = now + period_;
  }

 private:
  static constexpr Clock::duration shortest = std::chrono::milliseconds(4), longest = std::chrono::seconds(1);

  Clock::duration period_{0};
  Clock::time_point until_{};
};

thread_local Competition competition;

/// A calling thread and its workers.
///
/// Each thread has a share of a region's tasks, so that consecutive regions find their data in its cache. It takes half
/// of what is left of its share at a time, and then of the shares of the others.
///
/// A share's word holds the region's number and how many of the share's tasks nobody has taken. To take some is to
/// replace the word. If that succeeds, tasks were left, so the caller was in this region all the time, and the other
/// fields were this region's. So the caller needs to wait for tasks in flight only, not for workers.
class Team {
 public:
  explicit Team(int64_t threads) : shares_(threads) {}

  void run(int64_t count, size_t scratch_bytes, Body body) {
    if (shares_.size() == 1 || competition.works_alone()) return body(0, count, scratch_of(shares_[0], scratch_bytes));
    const auto start = Clock::now();
    const int64_t tasks_per_unit = (count >> unit_bits) + 1, units = (count + tasks_per_unit - 1) / tasks_per_unit;
    const int64_t threads = static_cast<int64_t>(shares_.size());
    region_ = {count, tasks_per_unit, scratch_bytes, body};
    in_flight_.store(static_cast<int32_t>(units), std::memory_order_relaxed);
    ++number_;
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t begin = units * i / threads, end = units * (i + 1) / threads;
      shares_[i].end.store(end, std::memory_order_relaxed);
      shares_[i].word.store(uint64_t{number_} << unit_bits | static_cast<uint64_t>(end - begin),
                            std::memory_order_release);
    }
    if (units > 1) announce(number_);
    work(0);
    const auto worked = Clock::now();
    const auto done = [&] { return in_flight_.load(std::memory_order_acquire) == 0; };
    if (!spin(caller_spin, done)) {
      for (int32_t left; (left = in_flight_.load(std::memory_order_acquire)) != 0;)
        in_flight_.wait(left, std::memory_order_acquire);
      if (Clock::now() - worked > std::max<Clock::duration>(stall, worked - start)) competition.stalled();
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  /// The workers leave `serve`.
  void dismiss() { announce(dismissed); }

  /// What worker `index` does, from 1.
  void serve(int64_t index) {
    for (uint32_t seen = 0;;) {
      uint32_t number = seen;
      const auto announced = [&] { return (number = announced_.load(std::memory_order_acquire)) != seen; };
      if (!spin(worker_spin, announced))
        while (!announced())
          announced_.wait(seen, std::memory_order_acquire);
      if (number == dismissed) return;
      seen = number;
      work(index);
    }
  }

 private:
  /// Units of tasks are counted in these bits of a word. A region has less than 2^24.
  static constexpr int unit_bits = 24;
  static constexpr uint32_t dismissed = UINT32_MAX;

  struct Region {
    int64_t count = 0, tasks_per_unit = 1;
    size_t scratch_bytes = 0;
    std::optional<Body> body;
  };

  struct alignas(64) Share {
    std::atomic<uint64_t> word{0};
    std::atomic<int64_t> end{0};
    c10::DataPtr scratch;  // of the thread
    size_t scratch_bytes = 0;
  };

  static std::byte* scratch_of(Share& own, size_t bytes) {
    if (own.scratch_bytes < bytes) {
      own.scratch = c10::GetCPUAllocator()->allocate(bytes);  // 64-byte aligned
      own.scratch_bytes = bytes;
    }
    return static_cast<std::byte*>(own.scratch.get());
  }

  void announce(uint32_t number) {
    // not release: notify_all reads libstdc++'s count of sleepers, and must not do so before this store is seen.
    // Otherwise a worker that falls asleep in between stays asleep, and `dismiss` waits for it without end.
    announced_.store(number, std::memory_order_seq_cst);
    announced_.notify_all();
  }

  void work(int64_t index) {
    const int64_t threads = static_cast<int64_t>(shares_.size());
    for (int64_t i = 0; i < threads; ++i) {
      Share& share = shares_[(index + i) % threads];
      for (int64_t first, units; take(share, first, units);)
        compute(first, units, shares_[index]);
    }
  }

  bool take(Share& share, int64_t& first, int64_t& units) {
    constexpr uint64_t mask = (uint64_t{1} << unit_bits) - 1;
    uint64_t word = share.word.load(std::memory_order_acquire);
    do {
      const int64_t left = static_cast<int64_t>(word & mask);
      if (left == 0) return false;
      units = (left + 1) / 2;
      first = share.end.load(std::memory_order_relaxed) - left;
    } while (!share.word.compare_exchange_weak(word, word - static_cast<uint64_t>(units), std::memory_order_acquire));
    return true;
  }

  void compute(int64_t first, int64_t units, Share& own) {
    const Region& region = region_;
    try {
      (*region.body)(first* region.tasks_per_unit, std::min(region.count, (first + units) * region.tasks_per_unit),
                     scratch_of(own, region.scratch_bytes));
    } catch (...) {
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
    if (in_flight_.fetch_sub(static_cast<int32_t>(units), std::memory_order_seq_cst) == units) in_flight_.notify_all();
  }

  std::vector<Share> shares_;
  Region region_;
  uint32_t number_ = 0;                 // of the region
  std::atomic<uint32_t> announced_{0};  // the number of the region, for workers
  std::atomic<int32_t> in_flight_{0};   // units of the region that are not finished
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

/// The team of this thread's program; null in the tasks of a region.
thread_local Team* current = nullptr;

/// Sets `current` for a scope.
class Current {
 public:
  explicit Current(Team* team) : before_(std::exchange(current, team)) {}
  ~Current() { current = before_; }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  Team* before_;
};

#ifdef _OPENMP
/// Torch's operators use one thread of this one's.
class OneThread {
 public:
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const int before_ = omp_get_max_threads();
};
#endif

}  // namespace

void parallel(int64_t count, size_t scratch_bytes, Body body) {
  if (Team* team = current) {
    const Current none(nullptr);
    return team->run(count, scratch_bytes, body);
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const c10::DataPtr scratch = c10::GetCPUAllocator()->allocate(scratch_bytes);
    body(begin, end, static_cast<std::byte*>(scratch.get()));
  });
}

void with_team(c10::function_ref<void()> program) {
#ifdef _OPENMP
  const int threads = at::get_num_threads();
  if (threads == 1 || at::in_parallel_region()) return program();
  if (competition.works_alone()) {
    Team team(1);
    const Current mine(&team);
    const OneThread guard;
    return program();
  }
  Team team(threads);
  std::exception_ptr error;
  Clock::time_point began, ended;
  const auto start = Clock::now();
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_thread_num() == 0) {
      began = Clock::now();
      const Current mine(&team);
      try {
        program();
      } catch (...) {
        error = std::current_exception();
      }
      ended = Clock::now();
      team.dismiss();
    } else {
      team.serve(omp_get_thread_num());
    }
  }
  if (Clock::now() - ended + (began - start) > 2 * stall) competition.stalled();
  if (error) std::rethrow_exception(error);
#else
  program();
#endif
}

}  // namespace mobilemamba::cpu
