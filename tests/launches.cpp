// The functions of csrc/cuda/launch.h and launch_rows.h as a Python module, under their own names. tests/test_launch.py
// builds it.
#include "cuda/launch_rows.h"

#include <pybind11/pybind11.h>

#include <map>
#include <string>

namespace py = pybind11;
using namespace py::literals;

namespace mobilemamba {
namespace {

DType dtype_of(const std::string& name) {
  static const std::map<std::string, DType> names = {{"float32", DType::float32},
                                                     {"float64", DType::float64},
                                                     {"float16", DType::float16},
                                                     {"bfloat16", DType::bfloat16}};
  return names.at(name);
}

ScanForward scan_sizes(const std::string& dtype, int64_t batch, int64_t channels, int64_t length, int64_t state) {
  ScanForward sizes{};
  sizes.dtype = dtype_of(dtype);
  sizes.batch = batch;
  sizes.channels = channels;
  sizes.length = length;
  sizes.state = state;
  return sizes;
}

DepthwiseSizes depthwise_sizes(const std::string& dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
                               int64_t kernel, int64_t stride) {
  return {dtype_of(dtype), batch, channels, height, width, kernel, stride};
}

cuda::PlaneSizes depthwise_plane_sizes(const DepthwiseSizes& sizes) {
  return cuda::PlaneSizes(sizes);
}

cuda::PlaneSizes haar_sizes(const std::string& dtype, int64_t batch, int64_t channels, int64_t height, int64_t width,
                            int64_t kernel) {
  return cuda::PlaneSizes(HaarSizes{dtype_of(dtype), batch, channels, height, width, kernel});
}

/// Of a product whose tensors are contiguous.
PackedConvForward product_sizes(int64_t batch, int64_t in_channels, int64_t height, int64_t width, int64_t out_channels,
                                int64_t kernel, int64_t stride) {
  PackedConvForward sizes{};
  sizes.batch = batch;
  sizes.in_channels = in_channels;
  sizes.height = height;
  sizes.width = width;
  sizes.out_channels = out_channels;
  sizes.kernel = kernel;
  sizes.stride = stride;
  sizes.input = {nullptr, height * width * in_channels, width * in_channels, in_channels};
  sizes.residual_row = sizes.second_residual_row = sizes.output_row = out_channels;
  return sizes;
}

/// Of a feed-forward layer whose tensors are contiguous.
FfnForward ffn_sizes(int64_t rows, int64_t channels, int64_t hidden) {
  FfnForward sizes{};
  sizes.rows = rows;
  sizes.channels = channels;
  sizes.hidden = hidden;
  sizes.input_row = sizes.residual_row = sizes.output_row = channels;
  return sizes;
}

/// Of a gate and the product behind it, in MRFFI's buffers. Their rows begin at aligned addresses.
GateProduct gate_product_sizes(int64_t rows, int64_t global, int64_t identity, int64_t inner) {
  GateProduct sizes{};
  sizes.gate.dtype = DType::bfloat16;
  sizes.gate.rows = rows;
  sizes.gate.channels = inner;
  sizes.gate.z_row = 2 * inner;
  sizes.out_channels = global;
  sizes.identity_channels = identity;
  sizes.identity_row = sizes.output_row = cuda::round_up(global + identity, 2);
  return sizes;
}

/// Of a convolution and the product behind it, in MRFFI's buffers.
ConvProduct conv_product_sizes(int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t outputs) {
  ConvProduct sizes{};
  sizes.dtype = DType::bfloat16;
  sizes.batch = batch;
  sizes.height = height;
  sizes.width = width;
  sizes.channels = channels;
  sizes.input_row = 2 * channels;
  sizes.out_channels = outputs;
  return sizes;
}

}  // namespace

PYBIND11_MODULE(launches, m) {
  using namespace cuda;
  py::class_<Launch>(m, "Launch")
      .def_readonly("tasks", &Launch::tasks)
      .def_readonly("warps", &Launch::warps)
      .def_readonly("shared_bytes", &Launch::shared_bytes);

  py::class_<ScanForward>(m, "ScanSizes")
      .def(py::init(&scan_sizes), "dtype"_a, "batch"_a, "channels"_a, "length"_a, "state"_a);
  py::class_<ScanShape>(m, "ScanShape")
      .def_readonly("chunk_length", &ScanShape::chunk_length)
      .def_readonly("max_warps", &ScanShape::max_warps);
  py::class_<ScanLaunch, Launch>(m, "ScanLaunch")
      .def_readonly("segments", &ScanLaunch::segments)
      .def_readonly("tiles", &ScanLaunch::tiles);
  m.def("scan_forward_shape", &scan_forward_shape, "float64"_a);
  m.def("scan_backward_shape", &scan_backward_shape, "float64"_a);
  m.def("scan_forward_launch", &scan_forward_launch, "sizes"_a);
  m.def("scan_backward_launch", &scan_backward_launch, "sizes"_a);
  m.def("scan_scratch_bytes", &scan_scratch_bytes, "sizes"_a, "launch"_a, "values"_a);

  py::class_<PlaneSizes>(m, "PlaneSizes").def("staged", &PlaneSizes::staged);
  m.def("depthwise_plane_sizes", &depthwise_plane_sizes, "sizes"_a);
  m.def("haar_sizes", &haar_sizes, "dtype"_a, "batch"_a, "channels"_a, "height"_a, "width"_a, "kernel"_a);
  py::class_<PlaneLaunch, Launch>(m, "PlaneLaunch")
      .def_readonly("tiles_y", &PlaneLaunch::tiles_y)
      .def_readonly("tiles_x", &PlaneLaunch::tiles_x)
      .def_readonly("tile_height", &PlaneLaunch::tile_height)
      .def_readonly("tile_width", &PlaneLaunch::tile_width)
      .def_readonly("stage_height", &PlaneLaunch::stage_height)
      .def_readonly("stage_width", &PlaneLaunch::stage_width);
  m.def("plane_launch", &plane_launch, "sizes"_a, "backward"_a, "shared_limit"_a);
  m.def("plane_slabs", &plane_slabs, "sizes"_a, "shared_limit"_a);

  py::class_<DepthwiseSizes>(m, "DepthwiseSizes")
      .def(py::init(&depthwise_sizes), "dtype"_a, "batch"_a, "channels"_a, "height"_a, "width"_a, "kernel"_a,
           "stride"_a);
  py::class_<DepthwiseLaunch, Launch>(m, "DepthwiseLaunch")
      .def_readonly("rows", &DepthwiseLaunch::rows)
      .def_readonly("strips_y", &DepthwiseLaunch::strips_y)
      .def_readonly("strips_x", &DepthwiseLaunch::strips_x)
      .def_readonly("strips", &DepthwiseLaunch::strips);
  m.def("depthwise_channels", &depthwise_channels, "element_bytes"_a, "kernel"_a);
  m.def("depthwise_launch", &depthwise_launch, "sizes"_a, "channels"_a);
  m.def("depthwise_backward_input_launch", &depthwise_backward_input_launch, "sizes"_a, "channels"_a);
  m.def("depthwise_backward_weight_launch", &depthwise_backward_weight_launch, "sizes"_a, "slabs"_a, "channels"_a);
  m.def("depthwise_slabs", &depthwise_slabs, "sizes"_a);

  py::class_<PackedConvForward>(m, "ProductSizes")
      .def(py::init(&product_sizes), "batch"_a, "in_channels"_a, "height"_a, "width"_a, "out_channels"_a, "kernel"_a,
           "stride"_a);
  py::enum_<ProductShape>(m, "ProductShape")
      .value("large", ProductShape::large)
      .value("medium", ProductShape::medium)
      .value("narrow", ProductShape::narrow)
      .value("small", ProductShape::small)
      .value("lines", ProductShape::lines);
  py::class_<ProductLaunch, Launch>(m, "ProductLaunch")
      .def_readonly("shape", &ProductLaunch::shape)
      .def_readonly("lines", &ProductLaunch::lines)
      .def_readonly("columns", &ProductLaunch::columns)
      .def_readonly("aligned", &ProductLaunch::aligned)
      .def_readonly("aligned_output", &ProductLaunch::aligned_output)
      .def_readonly("whole_outputs", &ProductLaunch::whole_outputs);
  m.def("product_launch", &product_launch, "sizes"_a);

  py::class_<FfnForward>(m, "FfnSizes").def(py::init(&ffn_sizes), "rows"_a, "channels"_a, "hidden"_a);
  py::class_<FfnLaunch, Launch>(m, "FfnLaunch")
      .def("exists", &FfnLaunch::exists)
      .def_readonly("rows", &FfnLaunch::rows)
      .def_readonly("across", &FfnLaunch::across)
      .def_readonly("blocks", &FfnLaunch::blocks)
      .def_readonly("steps", &FfnLaunch::steps)
      .def_readonly("parts", &FfnLaunch::parts)
      .def_readonly("expand_slices", &FfnLaunch::expand_slices)
      .def_readonly("expand_steps", &FfnLaunch::expand_steps)
      .def_readonly("project_slices", &FfnLaunch::project_slices)
      .def_readonly("project_steps", &FfnLaunch::project_steps)
      .def_readonly("input_pitch", &FfnLaunch::input_pitch)
      .def_readonly("stage_bytes", &FfnLaunch::stage_bytes)
      .def_readonly("aligned", &FfnLaunch::aligned)
      .def_readonly("whole_outputs", &FfnLaunch::whole_outputs);
  py::class_<GateProduct>(m, "GateProductSizes")
      .def(py::init(&gate_product_sizes), "rows"_a, "global"_a, "identity"_a, "inner"_a);
  py::class_<ConvProduct>(m, "ConvProductSizes")
      .def(py::init(&conv_product_sizes), "batch"_a, "height"_a, "width"_a, "channels"_a, "outputs"_a);
  m.def("conv_product_launch", &conv_product_launch, "sizes"_a, "shared_limit"_a, "always"_a = false);
  py::class_<RowTileLaunch, Launch>(m, "RowTileLaunch")
      .def("exists", &RowTileLaunch::exists)
      .def_readonly("rows", &RowTileLaunch::rows)
      .def_readonly("across", &RowTileLaunch::across)
      .def_readonly("steps", &RowTileLaunch::steps)
      .def_readonly("slices", &RowTileLaunch::slices)
      .def_readonly("panels", &RowTileLaunch::panels)
      .def_readonly("pairs", &RowTileLaunch::pairs)
      .def_readonly("pitch", &RowTileLaunch::pitch);
  m.def("gate_product_launch", &gate_product_launch, "sizes"_a, "shared_limit"_a, "always"_a = false);
  m.def("ffn_launch", &ffn_launch, "sizes"_a, "shared_limit"_a, "always"_a = false);
}

}  // namespace mobilemamba
