// A network's forward pass as CUDA graphs, by torch's own graphs; see the header.
#include "mobilemamba_cuda_graphs.h"

#include <c10/core/GradMode.h>

#ifdef MOBILEMAMBA_CUDA
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Event.h>
#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>  // CUDA_VERSION: the size of torch's CUDAGraph depends on it

#include <ATen/cuda/CUDAGraph.h>

#include <algorithm>
#include <list>
#include <mutex>
#endif

namespace mobilemamba {

#ifdef MOBILEMAMBA_CUDA

namespace cuda_graphs {  // named, since CUDAGraphs::Graphs, which other files know of, has a Graph

constexpr int warm_up = 3;  // calls before a capture, as torch.cuda.make_graphed_callables makes

/// torch captures one graph at a time in a process.
inline std::mutex& capturing() {
  static std::mutex mutex;
  return mutex;
}

/// What a graph belongs to.
struct Occasion {
  c10::Stream stream;
  std::vector<int64_t> sizes, strides;
  at::ScalarType type;
  std::optional<at::ScalarType> autocast;

  explicit Occasion(const at::Tensor& images)
      : stream(c10::cuda::getCurrentCUDAStream()),
        sizes(images.sizes().vec()),
        strides(images.strides().vec()),
        type(images.scalar_type()) {
    if (at::autocast::is_autocast_enabled(at::kCUDA)) autocast = at::autocast::get_autocast_dtype(at::kCUDA);
  }

  bool operator==(const Occasion& other) const {
    return stream == other.stream && sizes == other.sizes && strides == other.strides && type == other.type &&
           autocast == other.autocast;
  }
};

/// Makes `later` wait for what is in `earlier` by now.
inline void order(const c10::Stream& earlier, const c10::Stream& later) {
  c10::Event event(c10::DeviceType::CUDA);
  event.record(earlier);
  event.block(later);
}

/// Autocast keeps no casts inside this scope: those of a capture are not there for others.
class WithoutCasts {
 public:
  WithoutCasts() : before_(at::autocast::is_autocast_cache_enabled()) {
    at::autocast::set_autocast_cache_enabled(false);
  }
  ~WithoutCasts() { at::autocast::set_autocast_cache_enabled(before_); }

 private:
  bool before_;
};

struct Graph {
  Occasion occasion;
  c10::cuda::CUDAStream side;  // the default stream cannot be captured
  at::cuda::MempoolId_t pool;
  at::cuda::CUDAGraph graph;
  at::Tensor input, output;

  Graph(Occasion of, c10::cuda::CUDAStream stream, at::cuda::MempoolId_t memory)
      : occasion(std::move(of)), side(stream), pool(memory) {}

  void capture(const CUDAGraphs::Network& network, const at::Tensor& images) {
    const std::lock_guard alone(capturing());
    const c10::InferenceMode normal(false);  // a tensor of inference mode could not be written outside of it
    const at::NoGradGuard no_gradients;
    const WithoutCasts without_casts;
    input = at::empty_like(images);
    input.copy_(images);
    order(occasion.stream, side);
    {
      const c10::cuda::CUDAStreamGuard guard(side);
      for (int i = 0; i < warm_up; ++i)
        network(input);
    }
    order(side, occasion.stream);
    c10::cuda::device_synchronize();
    c10::cuda::CUDACachingAllocator::emptyCache();  // that of graphs that are gone, too
    const c10::cuda::CUDAStreamGuard guard(side);
    graph.capture_begin(pool, cudaStreamCaptureModeThreadLocal);  // other threads may allocate meanwhile
    try {
      output = network(input);
    } catch (...) {
      try {
        graph.capture_end();
      } catch (const c10::Error&) {  // of the capture that the first error has broken
      }
      throw;
    }
    graph.capture_end();
  }
};

}  // namespace cuda_graphs

struct CUDAGraphs::Graphs {
  using Graph = cuda_graphs::Graph;

  Network network;
  size_t limit;
  std::mutex mutex;
  std::list<Graph> kept;  // that of the latest call is the first

  at::Tensor call(const at::Tensor& images) {
    const std::lock_guard lock(mutex);
    const c10::cuda::CUDAGuard device(images.device());
    if (images.numel() == 0) return network(images);  // launches nothing
    cuda_graphs::Occasion occasion(images);
    auto found = std::find_if(kept.begin(), kept.end(), [&](const Graph& g) { return g.occasion == occasion; });
    if (found == kept.end()) {
      while (kept.size() >= limit)
        kept.pop_back();
      // The graphs of a stream share their memory: they run one after another.
      const auto neighbour =
          std::find_if(kept.begin(), kept.end(), [&](const Graph& g) { return g.occasion.stream == occasion.stream; });
      const bool alone = neighbour == kept.end();
      const auto side = alone ? c10::cuda::getStreamFromPool(false, images.device().index()) : neighbour->side;
      const auto pool = alone ? at::cuda::graph_pool_handle() : neighbour->pool;
      std::list<Graph> made;
      made.emplace_back(std::move(occasion), side, pool).capture(network, images);
      kept.splice(kept.begin(), made);
      found = kept.begin();
    }
    kept.splice(kept.begin(), kept, found);
    found->input.copy_(images);
    found->graph.replay();
    return found->output.clone();
  }

  void clear() {
    const std::lock_guard lock(mutex);
    kept.clear();
  }
};

#else

struct CUDAGraphs::Graphs {
  Network network;
  size_t limit;

  at::Tensor call(const at::Tensor&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "CUDAGraphs: the library was built without CUDA; rebuild it with CUDA");
  }
  void clear() {}
};

#endif

CUDAGraphs::CUDAGraphs(Network network, size_t limit) : graphs_(std::make_unique<Graphs>()) {
  TORCH_CHECK_VALUE(limit > 0, "CUDAGraphs: limit is 0, expected at least 1");
  graphs_->network = std::move(network);
  graphs_->limit = limit;
}

CUDAGraphs::~CUDAGraphs() = default;

at::Tensor CUDAGraphs::operator()(const at::Tensor& images) {
  TORCH_CHECK_VALUE(images.is_cuda(), "CUDAGraphs: the images are on ", images.device(),
                    ", expected CUDA; there, call the network itself");
  TORCH_CHECK_VALUE(!c10::GradMode::is_enabled(),
                    "CUDAGraphs: a replay has no gradients; call it under c10::InferenceMode or at::NoGradGuard");
  return graphs_->call(images);
}

void CUDAGraphs::clear() {
  graphs_->clear();
}

}  // namespace mobilemamba
