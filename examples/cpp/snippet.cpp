// The README's program: loads a model and runs it, with no Python in the process.
#include <torch/script.h>

#include <algorithm>
#include <iostream>

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: snippet MODEL, a file of `mobilemamba export --format torchscript`\n";
    return 2;
  }
  try {
    torch::jit::ExtraFilesMap records = {
        {"mobilemamba.labels", ""}, {"mobilemamba.crop", ""}, {"mobilemamba.mean", ""}};
    torch::jit::Module model = torch::jit::load(arguments[1], torch::kCPU, records);

    const int64_t pixels = std::stoll(records["mobilemamba.crop"]);
    const auto& mean = records["mobilemamba.mean"];
    const int64_t channels = 1 + std::count(mean.begin(), mean.end(), ' ');
    const c10::InferenceMode no_gradients;
    const torch::Tensor images = torch::zeros({2, channels, pixels, pixels});  // see examples/cpp for real ones
    const torch::Tensor classes = model.forward({images}).toTensor().argmax(1);
    std::cout << classes << "\n" << records["mobilemamba.labels"] << "\n";
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 2;
  }
}
