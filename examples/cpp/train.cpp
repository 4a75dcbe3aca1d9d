// Trains a file of `mobilemamba export --format torchscript --trainable` for a few steps: gradients flow through the
// operators with no Python in the process. The task is made up: which quarter of a noisy image is the bright one.
#include <torch/optim.h>
#include <torch/script.h>

#include <cstdio>

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

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: train MODEL STEPS\n");
    return 2;
  }
  try {
    torch::manual_seed(0);
    torch::jit::Module model = torch::jit::load(arguments[1]);
    model.train();
    std::vector<torch::Tensor> parameters;
    for (const torch::Tensor& parameter : model.parameters())
      parameters.push_back(parameter);
    torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-3));
    for (int step = 0; step < std::stoi(arguments[2]); ++step) {
      const auto [images, quarters] = batch(32, 1);
      const torch::Tensor loss = torch::cross_entropy_loss(model.forward({images}).toTensor(), quarters);
      optimizer.zero_grad();
      loss.backward();
      optimizer.step();
      std::printf("step %d: loss %.4f\n", step, loss.item<float>());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train: error: %s\n", error.what());
    return 2;
  }
}
