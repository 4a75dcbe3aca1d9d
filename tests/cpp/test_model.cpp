// test_model MODEL CASES TOLERANCE: the logits of a file, one after the other and from eight threads at once, against
// those that Python computed (over the largest of them).
#include <ATen/ATen.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>

#include "model.h"

namespace {

struct Case {
  at::Tensor images, logits;
};

std::vector<Case> read_cases(const char* path) {
  std::ifstream stream(path, std::ios::binary);
  const c10::IValue stored = torch::jit::pickle_load({std::istreambuf_iterator<char>(stream), {}});
  std::vector<Case> cases;
  for (const c10::IValue& pair : stored.toListRef())
    cases.push_back({pair.toTupleRef().elements()[0].toTensor(), pair.toTupleRef().elements()[1].toTensor()});
  return cases;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const Model model(arguments[1], at::kCPU);
  const std::vector<Case> cases = read_cases(arguments[2]);
  const double tolerance = std::stod(arguments[3]);
  int failures = cases.empty();

  std::vector<at::Tensor> alone;
  for (const Case& c : cases) {
    alone.push_back(model(c.images));
    const at::Tensor expected = c.logits.to(at::kDouble);
    const double difference =
        ((alone.back().to(at::kDouble) - expected).abs().max() / expected.abs().max()).item<double>();
    std::printf("%ld images of %ld x %ld: %.1e\n", c.images.size(0), c.images.size(2), c.images.size(3), difference);
    failures += !(difference <= tolerance);
  }

  std::vector<int> different(8);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < different.size(); ++t)
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < 2 * cases.size(); ++i) {
        const size_t k = (i + t) % cases.size();  // at any time the threads run different sizes
        different[t] += !model(cases[k].images).equal(alone[k]);
      }
    });
  for (std::thread& thread : threads)
    thread.join();
  for (const int number : different) {
    std::printf("a thread among eight: %d of %zu results differ\n", number, 2 * cases.size());
    failures += number;
  }
  return failures > 0;
}
