// test_preprocessing MODEL IMAGES: pixels and normalised values of image files against Python's, by the model's rules.
#include <ATen/ATen.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>

#include "model.h"

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const Model model(arguments[1], at::kCPU);
  std::ifstream stream(arguments[2], std::ios::binary);
  const c10::IValue stored = torch::jit::pickle_load({std::istreambuf_iterator<char>(stream), {}});
  int failures = stored.toListRef().empty();
  for (const c10::IValue& entry : stored.toListRef()) {  // path, pixels, normalised
    const auto& fields = entry.toTupleRef().elements();
    const Image image = read_image(fields[0].toStringRef());
    const at::Tensor pixels = model.preprocessing.pixels(image), expected = fields[1].toTensor();
    const int difference = (pixels.to(at::kInt) - expected.to(at::kInt)).abs().max().item<int>();
    const float normalised = (model.preprocessing(image) - fields[2].toTensor()).abs().max().item<float>();
    std::printf("%s: %d / 255, normalised %.1e\n", fields[0].toStringRef().c_str(), difference, normalised);
    failures += difference > 1 || (difference == 0 && !(normalised <= 1e-6));
  }
  return failures > 0;
}
