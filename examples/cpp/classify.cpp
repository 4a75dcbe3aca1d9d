// mobilemamba-classify MODEL IMAGE...: names what is in images, with a file of `mobilemamba export`. An image that
// cannot be read is one line on stderr, and exit code 1 at the end; other wrong input is one line and exit code 2.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/csrc/api/include/torch/cuda.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <stdexcept>

#include "image.h"
#include "model.h"

namespace {

constexpr const char* usage =
    "usage: mobilemamba-classify MODEL IMAGE... [--device cpu|cuda] [--threads N] [--benchmark RUNS] [--help]";

struct Options {
  std::vector<std::string> files;  // the model, then images
  at::Device device = at::kCPU;
  int threads = 0, benchmark = 0;
  bool help = false;
};

int positive(const std::string& option, const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1)
    throw std::runtime_error(option + ": expected a number of at least 1, got '" + text + "'");
  return value;
}

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      options.help = true;
      return options;
    }
    if (!argument.starts_with("-")) {
      options.files.push_back(argument);
      continue;
    }
    if (argument != "--threads" && argument != "--benchmark" && argument != "--device")
      throw std::runtime_error("unknown option " + argument + "; " + usage);
    if (++i == arguments.size()) throw std::runtime_error(argument + ": expected a value; " + usage);
    const std::string& value = arguments[i];
    if (argument == "--threads") {
      options.threads = positive(argument, value);
    } else if (argument == "--benchmark") {
      options.benchmark = positive(argument, value);
    } else if (value == "cpu" || value == "cuda") {
      options.device = at::Device(value);
    } else {
      throw std::runtime_error("--device: expected cpu or cuda, got '" + value + "'");
    }
  }
  if (options.files.size() < 2)
    throw std::runtime_error("expected a model and at least one image; " + std::string(usage));
  if (options.device.is_cuda() && !torch::cuda::is_available())
    throw std::runtime_error("--device cuda: this torch or this machine has no CUDA");
  return options;
}

void classify(const Model& model, const std::string& path, const at::Tensor& image) {
  const at::Tensor logits = model(image.unsqueeze(0))[0].to(at::kCPU, at::kFloat);
  const auto [probabilities, classes] = logits.softmax(0).topk(std::min<int64_t>(5, logits.size(0)));
  std::printf("%s\n", path.c_str());
  for (int64_t i = 0; i < classes.size(0); ++i) {
    const size_t index = classes[i].item<int64_t>();
    const std::string name = index < model.labels.size() ? model.labels[index] : "class " + std::to_string(index);
    std::printf("  %-20s %5.1f%%\n", name.c_str(), 100 * probabilities[i].item<float>());
  }
}

void benchmark(const Model& model, const at::Tensor& images, int runs) {
  std::vector<double> times;
  for (int i = -3; i < runs; ++i) {  // the first three warm up
    const auto start = std::chrono::steady_clock::now();
    model(images).cpu();
    const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - start;
    if (i >= 0) times.push_back(passed.count());
  }
  std::sort(times.begin(), times.end());
  std::printf("%d runs, batch 1, %d threads: median %.2f ms, %.2f to %.2f ms\n", runs, at::get_num_threads(),
              times[times.size() / 2], times.front(), times.back());
}

}  // namespace

int main(int count, char** arguments) {
  try {
    const Options options = parse({arguments + 1, arguments + count});
    if (options.help) {
      std::puts(usage);
      return 0;
    }
    if (options.threads) at::set_num_threads(options.threads);
    const Model model(options.files[0], options.device);
    at::Tensor latest;
    bool failed = false;
    for (size_t i = 1; i < options.files.size(); ++i) {
      Image image;
      try {
        image = read_image(options.files[i]);
      } catch (const std::runtime_error& error) {
        std::fprintf(stderr, "mobilemamba-classify: error: %s\n", error.what());
        failed = true;
        continue;
      }
      latest = model.preprocessing(image);
      classify(model, options.files[i], latest);
      if (std::fflush(stdout)) throw std::runtime_error("the output cannot be written");
    }
    if (options.benchmark && latest.defined()) benchmark(model, latest.unsqueeze(0), options.benchmark);
    return failed;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mobilemamba-classify: error: %s\n", error.what());
    return 2;
  }
}
