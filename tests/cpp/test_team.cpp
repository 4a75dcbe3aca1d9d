// The CPU's parallel regions (csrc/cpu/team.h): each task once, scratch memory, exceptions, nesting.
#include "cpu/team.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <vector>

namespace {

using mobilemamba::cpu::parallel;
using mobilemamba::cpu::with_team;

int failures = 0;

void expect(bool right, const char* what, int64_t number) {
  if (right) return;
  std::printf("wrong: %s, %ld\n", what, static_cast<long>(number));
  ++failures;
}

void each_task_once(int64_t count) {
  std::vector<uint8_t> calls(count);
  parallel(count, 0, [&](int64_t begin, int64_t end, std::byte*) {
    for (int64_t i = begin; i < end; ++i)
      ++calls[i];
  });
  expect(std::all_of(calls.begin(), calls.end(), [](uint8_t n) { return n == 1; }), "each task once", count);
}

void scratch_is_of_one_thread(size_t bytes) {
  std::atomic<int> wrong{0};
  parallel(64, bytes, [&](int64_t begin, int64_t end, std::byte* scratch) {
    wrong += reinterpret_cast<uintptr_t>(scratch) % 64 != 0;
    for (int64_t i = begin; i < end; ++i) {
      std::fill_n(scratch, bytes, static_cast<std::byte>(i));
      wrong += std::count(scratch, scratch + bytes, static_cast<std::byte>(i)) != static_cast<int64_t>(bytes);
    }
  });
  expect(wrong == 0, "scratch", static_cast<int64_t>(bytes));
}

void exceptions_arrive(int64_t task) {
  try {
    parallel(100, 0, [&](int64_t begin, int64_t end, std::byte*) {
      if (begin <= task && task < end) throw std::runtime_error("task");
    });
    expect(false, "an exception", task);
  } catch (const std::runtime_error&) {
  }
  each_task_once(100);
}

void regions_nest() {
  std::atomic<int64_t> sum{0};
  parallel(10, 0, [&](int64_t begin, int64_t end, std::byte*) {
    for (int64_t i = begin; i < end; ++i)
      with_team([&] { parallel(10, 0, [&](int64_t first, int64_t last, std::byte*) { sum += last - first; }); });
  });
  expect(sum == 100, "nested regions", sum);
}

void regions() {
  for (const int64_t count : {0, 1, 2, 3, 7, 64, 1000})
    each_task_once(count);
  for (int i = 0; i < 5000; ++i)
    each_task_once(i % 50);
  for (const size_t bytes : {64, 4096, 1000, 1 << 20})
    scratch_is_of_one_thread(bytes);
  for (const int64_t task : {0, 1, 50, 99})
    exceptions_arrive(task);
  regions_nest();
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 16}) {
    at::set_num_threads(threads);
    regions();  // at::parallel_for's
    for (int i = 0; i < 3; ++i)
      with_team(regions);
    try {
      with_team([] { throw std::runtime_error("program"); });
      expect(false, "the program's exception", threads);
    } catch (const std::runtime_error&) {
    }
    expect(at::get_num_threads() == threads, "the number of threads", threads);
  }
  for (const int64_t count : {(1 << 24) - 1, 1 << 24, (1 << 25) + 5})  // more than a share counts one by one
    with_team([&] { each_task_once(count); });
  std::printf("%d failures\n", failures);
  return failures > 0;
}
