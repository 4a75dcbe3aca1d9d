// CUDAGraphs in C++: without a GPU what it refuses, with one its replays against the network itself.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/api/include/torch/cuda.h>

#include <atomic>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "mobilemamba_cuda_graphs.h"

namespace {

int failures = 0;

void check(bool holds, const char* what) {
  std::printf("%s: %s\n", holds ? "passed" : "FAILED", what);
  failures += !holds;
}

template <typename Call>
void refuses(const std::string& message, const Call& call) {
  std::string found = "nothing";
  try {
    call();
  } catch (const c10::Error& error) {
    found = error.what_without_backtrace();
  }
  if (!found.starts_with(message)) std::printf("got: %s\n", found.c_str());
  check(found.starts_with(message), message.c_str());
}

void on_a_gpu() {
  const at::Tensor weight = at::randn({3, 5}, at::kCUDA);
  std::atomic<int> passes = 0;
  mobilemamba::CUDAGraphs graphs(
      [&](const at::Tensor& x) {
        ++passes;
        return x.matmul(weight).relu();
      },
      2);
  const auto right = [&](const at::Tensor& x, const at::Tensor& y) { return y.allclose(x.matmul(weight).relu()); };
  refuses("CUDAGraphs: a replay has no gradients", [&] { graphs(weight); });
  const c10::InferenceMode no_gradients;
  const auto images = [](int64_t batch) { return at::randn({batch, 3}, at::kCUDA); };
  const at::Tensor one = images(1), two = images(2), other = images(1);
  const at::Tensor of_one = graphs(one), of_two = graphs(two), of_other = graphs(other);
  check(right(one, of_one) && right(two, of_two) && right(other, of_other), "replays compute the network");
  check(passes == 8, "two shapes are two captures");
  graphs(images(3));
  graphs(other);
  graphs(two);
  check(passes == 16, "the graph that is unused longest goes");
  weight.mul_(2);
  check(right(one, graphs(one)), "replays see new weights");
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < wrong.size(); ++t)
    threads.emplace_back([&, t] {
      const c10::InferenceMode of_thread;
      for (int i = 0; i < 50; ++i) {
        const at::Tensor x = images(1);
        wrong[t] += !right(x, graphs(x));
      }
    });
  for (std::thread& thread : threads)
    thread.join();
  for (const int number : wrong)
    check(number == 0, "a thread gets the results of its own images");
}

}  // namespace

int main() {
  mobilemamba::CUDAGraphs graphs([](const at::Tensor& x) { return x + 1; });
  refuses("CUDAGraphs: the images are on cpu, expected CUDA; there, call the network itself",
          [&] { graphs(at::zeros({1})); });
  refuses("CUDAGraphs: limit is 0, expected at least 1",
          [] { mobilemamba::CUDAGraphs([](const at::Tensor& x) { return x; }, 0); });
  graphs.clear();
  if (torch::cuda::is_available()) on_a_gpu();
  return failures > 0;
}
