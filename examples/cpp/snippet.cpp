// The program of docs/cpp.md: runs a .pt2 package, with no Python in the process.
#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>

#include <algorithm>
#include <iostream>

/// A text that `mobilemamba export` stored beside the network.
std::string record(const std::string& path, const std::string& name) {
  const auto [data, size] = caffe2::serialize::PyTorchStreamReader(path).getRecord("extra/mobilemamba." + name);
  return {static_cast<const char*>(data.get()), size};
}

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: snippet MODEL, a file of `mobilemamba export --format aoti`\n";
    return 2;
  }
  try {
    const std::string path = arguments[1];
    torch::inductor::AOTIModelPackageLoader model(path);

    const int64_t pixels = std::stoll(record(path, "crop"));
    const std::string mean = record(path, "mean");  // a value for each channel: "0.485 0.456 0.406"
    const int64_t channels = 1 + std::count(mean.begin(), mean.end(), ' ');
    const c10::InferenceMode no_gradients;
    const torch::Tensor images = torch::zeros({2, channels, pixels, pixels});  // see examples/cpp for real ones
    const torch::Tensor classes = model.run({images})[0].argmax(1);
    std::cout << classes << "\n" << record(path, "labels") << "\n";
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << "\n";
    return 2;
  }
}
