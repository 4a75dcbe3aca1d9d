// CUDA graphs for C++ programs: a network's forward pass as one launch. Programs compile against this header without a
// CUDA toolkit, and link with a library that was built without CUDA; there a call says so.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <functional>
#include <memory>

#include "mobilemamba.h"

namespace mobilemamba {

/// Calls a network by replaying CUDA graphs. The first call with images of a new shape runs the network several times
/// and captures a graph. Each later call copies its images into the graph's input, replays it, and returns a copy of
/// its output, which no later call changes. It computes no gradients.
///
/// A graph belongs to one shape, stride and type of the images, one stream, and one setting of autocast. `limit` graphs
/// are kept; a further one replaces the graph whose last call is longest ago. Any thread may call.
///
/// Replays see weights that change in place. Call clear() after weights have moved.
class MOBILEMAMBA_API CUDAGraphs {
 public:
  using Network = std::function<at::Tensor(const at::Tensor& images)>;

  /// `network` must not wait for the device. An AOTIModelPackageLoader must be made with run_single_threaded.
  explicit CUDAGraphs(Network network, size_t limit = 8);
  ~CUDAGraphs();
  CUDAGraphs(const CUDAGraphs&) = delete;
  CUDAGraphs& operator=(const CUDAGraphs&) = delete;

  /// Throws c10::Error, with one line, where the images are not on CUDA, where gradients are enabled, or where the
  /// library has no CUDA.
  at::Tensor operator()(const at::Tensor& images);

  /// Drops all graphs, which frees their memory.
  void clear();

 private:
  struct Graphs;
  std::unique_ptr<Graphs> graphs_;
};

}  // namespace mobilemamba
