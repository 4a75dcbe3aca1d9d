// A file of `mobilemamba export`, TorchScript or AOTInductor: the network, and what the file says about its use.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "preprocessing.h"

struct Model {
  std::vector<std::string> labels;  // empty where the file has none
  Preprocessing preprocessing;
  at::ScalarType dtype;

  /// Throws std::runtime_error, with the path, where the file is no such file, or for another device.
  Model(const std::string& path, at::Device device);

  /// Logits (batch, classes) of images (batch, channels, height, width), of any type, on any device. Thread-safe.
  at::Tensor operator()(const at::Tensor& images) const;

 private:
  at::Device device_;
  std::function<at::Tensor(const at::Tensor&)> run_;
};
