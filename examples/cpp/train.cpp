// Trains a file of `mobilemamba export --format torchscript --trainable` for a few steps: gradients flow through the
// operators with no Python in the process. The task is made up: which quarter of a noisy image is the bright one.
#include <torch/optim.h>
#include <torch/script.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace {

/// Images (batch, channels, 28, 28) and the numbers of their bright quarters.
std::pair<torch::Tensor, torch::Tensor> batch(int64_t size, int64_t channels) {
  torch::Tensor images = torch::randn({size, channels, 28, 28}), quarters = torch::randint(4, {size});
  for (int64_t i = 0; i < size; ++i) {
    const int64_t quarter = quarters[i].item<int64_t>();
    images[i].narrow(1, quarter / 2 * 14, 14).narrow(2, quarter % 2 * 14, 14) += 1;
  }
  return {images, quarters};
}

int number(const std::string& text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1)
    throw std::runtime_error("STEPS: expected a number of at least 1, got '" + text + "'");
  return value;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr,
                 "usage: train MODEL STEPS, with a file of `mobilemamba export --format torchscript --trainable`\n");
    return 2;
  }
  try {
    const int steps = number(arguments[2]);
    if (!std::filesystem::is_regular_file(arguments[1]))
      throw std::runtime_error(std::string(arguments[1]) + ": no such model file");
    torch::manual_seed(0);
    torch::jit::Module model = torch::jit::load(arguments[1]);
    model.train();
    std::vector<torch::Tensor> parameters;
    for (const torch::Tensor& parameter : model.parameters())
      if (parameter.requires_grad()) parameters.push_back(parameter);
    if (parameters.empty())
      throw std::runtime_error(std::string(arguments[1]) + ": nothing to train; export the model with --trainable");
    torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-3));
    for (int step = 0; step < steps; ++step) {
      const auto [images, quarters] = batch(32, 1);
      const torch::Tensor loss = torch::cross_entropy_loss(model.forward({images}).toTensor(), quarters);
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      std::printf("step %d: loss %.4f\n", step, loss.item<float>());
    }
  } catch (const std::exception& error) {
    const std::string text = error.what();  // torch's errors have several lines, and some begin with an empty one
    const size_t begin = std::min(text.find_first_not_of(" \n"), text.size());
    std::fprintf(stderr, "train: error: %s\n", text.substr(begin, text.find('\n', begin) - begin).c_str());
    return 2;
  }
}
