// Reads both kinds of archive; see model.h.
#include "model.h"

#include <c10/core/InferenceMode.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/import.h>

#include <mobilemamba_cuda_graphs.h>

#include <filesystem>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace {

constexpr int newest_version = 1;

/// The records that mobilemamba/deploy/exporting.py writes.
class Records {
 public:
  explicit Records(const std::string& path) : path_(path), archive_(path) {}

  bool has(const std::string& name) { return archive_.hasRecord(name); }

  std::string text(const std::string& name) {
    const std::string record = "extra/mobilemamba." + name;
    if (!has(record))
      throw std::runtime_error("expected a file of `mobilemamba export`, got one without the record " + record);
    const auto [data, size] = archive_.getRecord(record);
    return {static_cast<const char*>(data.get()), size};
  }

  template <typename T>
  T value(const std::string& name) {
    std::istringstream stream(text(name));
    T value;
    if (!(stream >> value)) throw std::runtime_error("the record " + name + " is '" + stream.str() + "'");
    return value;
  }

  std::vector<float> values(const std::string& name) {
    std::istringstream stream(text(name));
    return {std::istream_iterator<float>(stream), {}};
  }

  std::vector<std::string> lines(const std::string& name) {
    std::istringstream stream(text(name));
    std::vector<std::string> lines;
    for (std::string line; std::getline(stream, line);)
      lines.push_back(line);
    return lines;
  }

 private:
  std::string path_;
  caffe2::serialize::PyTorchStreamReader archive_;
};

at::ScalarType scalar_type(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  throw std::runtime_error("the record dtype is '" + name + "'");
}

std::function<at::Tensor(const at::Tensor&)> torchscript(const std::string& path, at::Device device) {
  auto network = std::make_shared<torch::jit::Module>(torch::jit::load(path, device));
  return [network](const at::Tensor& images) { return network->forward({images}).toTensor(); };
}

std::function<at::Tensor(const at::Tensor&)> aot_inductor(const std::string& path, at::Device device) {
  // A CUDA graph can be captured of a network that is run by one thread at a time.
  auto network = std::make_shared<torch::inductor::AOTIModelPackageLoader>(
      path, "model", /*run_single_threaded=*/device.is_cuda(), /*num_runners=*/1, device.index());
  return [network](const at::Tensor& images) { return network->run({images})[0]; };
}

/// The first sentence of an error of torch: what follows is advice and a stack.
std::string first_sentence(const std::string& text) {
  const size_t begin = std::min(text.find_first_not_of(" \n"), text.size());
  return text.substr(begin, std::min(text.find('\n', begin), text.find(". ", begin)) - begin);
}

}  // namespace

Model::Model(const std::string& path, at::Device device) : device_(device) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + ": no such model file");
  try {
    Records records(path);
    const int version = records.value<int>("version");
    if (version > newest_version)
      throw std::runtime_error("format version " + std::to_string(version) + " is newer than the " +
                               std::to_string(newest_version) + " that this program reads; build a newer one");
    dtype = scalar_type(records.text("dtype"));
    labels = records.lines("labels");
    preprocessing = {records.value<int64_t>("resize"), records.value<int64_t>("crop"), records.text("interpolation"),
                     records.values("mean"), records.values("std")};
    if (!records.has("archive_format")) {
      run_ = torchscript(path, device);
    } else if (const auto compiled = records.text("device"); at::Device(compiled).type() != device.type()) {
      throw std::runtime_error("compiled for " + compiled + ", asked to run on " + device.str());
    } else {
      run_ = aot_inductor(path, device);
    }
    if (device.is_cuda())
      run_ = [graphs = std::make_shared<mobilemamba::CUDAGraphs>(run_)](const at::Tensor& x) { return (*graphs)(x); };
  } catch (const c10::Error& error) {
    throw std::runtime_error(path + ": not a readable model file: " + first_sentence(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": " + first_sentence(error.what()));
  }
}

at::Tensor Model::operator()(const at::Tensor& images) const {
  const c10::InferenceMode no_gradients;
  return run_(images.to(device_, dtype));
}
