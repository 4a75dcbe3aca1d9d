// Host side of the MRFFI block; see the header.
#include "ops/mrffi.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/zeros.h>

#include "ops/common.h"
#include "ops/matrix.h"

namespace mobilemamba {

at::Tensor mrffi(const at::Tensor& input, const std::optional<at::Tensor>& residual, at::TensorList weights,
                 double eps) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("mobilemamba::mrffi", "").typed<decltype(mrffi)>();
  return op.call(input, residual, weights, eps);
}

MrffiGradients mrffi_backward(const at::Tensor& grad_output, const at::Tensor& input, at::TensorList weights,
                              double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mobilemamba::mrffi_backward", "")
                             .typed<decltype(mrffi_backward)>();
  return op.call(grad_output, input, weights, eps);
}

namespace {

at::TensorList checked_count(at::TensorList list) {
  TORCH_CHECK(list.size() == MrffiWeights::count, "mrffi: weights has ", list.size(), " tensors, expected ",
              MrffiWeights::count);
  return list;
}

}  // namespace

MrffiWeights::MrffiWeights(at::TensorList list)
    : in_weight(checked_count(list)[0]),
      in_bias(list[1]),
      conv_weight(list[2]),
      conv_bias(list[3]),
      x_weight(list[4]),
      dt_weight(list[5]),
      dt_bias(list[6]),
      A_log(list[7]),
      D(list[8]),
      norm_weight(list[9]),
      norm_bias(list[10]),
      out_weight(list[11]),
      out_bias(list[12]),
      wavelet_weight(list[13]),
      local_weight(list[14]),
      local_bias(list[15]),
      local_scale(list[16]),
      local_shift(list[17]),
      proj_weight(list[18]),
      proj_bias(list[19]) {}

void MrffiArguments::check(const std::optional<at::Tensor>& residual) const {
  const Checks check("mrffi", "input", input);
  const MrffiWeights w(weights);
  check.dimensions("input", input, 4, "(batch, channels, height, width)");
  check.dimensions("in_bias", w.in_bias, 1, "(2 * D)");
  check.dimensions("dt_weight", w.dt_weight, 3, "(2, D, R)");
  check.dimensions("A_log", w.A_log, 3, "(2, D, N)");
  check.dimensions("out_bias", w.out_bias, 1, "(G)");
  check.dimensions("local_bias", w.local_bias, 1, "(P)");
  const c10::SymInt channels = input.sym_size(1), inner = w.A_log.sym_size(1), rank = w.dt_weight.sym_size(2);
  const c10::SymInt state = w.A_log.sym_size(2), global = w.out_bias.sym_size(0), local = w.local_bias.sym_size(0);
  TORCH_SYM_CHECK((global + local).sym_le(channels), "mrffi: input has ", channels, " channels, expected at least the ",
                  global, " of out_bias and the ", local, " of local_bias");
  check.at_least_one("a rank R", rank, "dt_weight", w.dt_weight);
  check.at_least_one("a state size N", state, "A_log", w.A_log);

  const auto parameter = [&](const char* name, const at::Tensor& tensor, c10::SymIntArrayRef sizes,
                             const char* layout) {
    check.shape(name, tensor, sizes, layout);
    check.parameter(name, tensor);
  };
  const auto kernel = [&](const char* name, const at::Tensor& weight, const c10::SymInt& out, int64_t planes,
                          const char* layout) {
    check.dimensions(name, weight, 4, layout);
    const c10::SymInt k = weight.sym_size(3);
    parameter(name, weight, {out, planes, k, k}, layout);
    TORCH_SYM_CHECK((k % 2).sym_eq(1), "mrffi: ", name, " has shape ", weight.sym_sizes(),
                    ", expected an odd kernel size k");
  };
  check_matrix(check, "in_weight", w.in_weight, inner * 2, global);
  parameter("in_bias", w.in_bias, {inner * 2}, "(2 * D)");
  kernel("conv_weight", w.conv_weight, inner, 1, "(D, 1, k, k)");
  parameter("conv_bias", w.conv_bias, {inner}, "(D)");
  check_matrix(check, "x_weight", w.x_weight, (rank + state * 2) * 2, inner);
  parameter("dt_weight", w.dt_weight, {2, inner, rank}, "(2, D, R)");
  parameter("dt_bias", w.dt_bias, {2, inner}, "(2, D)");
  parameter("A_log", w.A_log, {2, inner, state}, "(2, D, N)");
  parameter("D", w.D, {2, inner}, "(2, D)");
  parameter("norm_weight", w.norm_weight, {inner}, "(D)");
  parameter("norm_bias", w.norm_bias, {inner}, "(D)");
  check_matrix(check, "out_weight", w.out_weight, global, inner);
  parameter("out_bias", w.out_bias, {global}, "(G)");
  kernel("wavelet_weight", w.wavelet_weight, global, 4, "(G, 4, k, k)");
  kernel("local_weight", w.local_weight, local, 1, "(P, 1, k, k)");
  parameter("local_bias", w.local_bias, {local}, "(P)");
  parameter("local_scale", w.local_scale, {local}, "(P)");
  parameter("local_shift", w.local_shift, {local}, "(P)");
  check_matrix(check, "proj_weight", w.proj_weight, channels, channels);
  parameter("proj_bias", w.proj_bias, {channels}, "(C)");
  if (residual) {
    check.shape("residual", *residual, input.sym_sizes(), "(batch, channels, height, width)");
    check.like_main("residual", *residual);
  }
}

void MrffiArguments::check_backward(const at::Tensor& grad_output) const {
  check(std::nullopt);
  const Checks check("mrffi_backward", "input", input);
  check.shape("grad_output", grad_output, input.sym_sizes(), "(batch, channels, height, width)");
  check.like_main("grad_output", grad_output);
}

at::Tensor MrffiArguments::output() const {
  return at::empty_symint(input.sym_sizes(), input.options(), at::MemoryFormat::ChannelsLast);
}

MrffiGradients MrffiArguments::gradients() const {
  std::vector<at::Tensor> grads;
  for (const at::Tensor& weight : weights)
    grads.push_back(at::empty_symint(weight.sym_sizes(), weight.options()));
  return {output(), grads};
}

namespace {

/// What the scan takes of the projection (positions, 2 * (R + 2N)): delta, B and C.
std::array<at::Tensor, 3> scan_rows(const at::Tensor& projected, int64_t batch, int64_t rank, int64_t state) {
  const at::Tensor rows = projected.view({batch, -1, 2, rank + 2 * state}).permute({0, 2, 3, 1});
  return {rows.narrow(2, 0, rank), rows.narrow(2, rank, state), rows.narrow(2, rank + state, state)};
}

at::Tensor sequence(const at::Tensor& positions, int64_t batch) {
  return positions.view({batch, -1, positions.size(1)}).transpose(1, 2);
}

}  // namespace

void product_with_torch(const Product& p, at::Tensor output) {
  at::Tensor y = linear_with_torch(p.input, p.weight, p.bias, output.size(1));
  if (p.residual && p.residual_inside) y.add_(*p.residual);
  if (p.relu) y.relu_();
  if (p.residual && !p.residual_inside) y.add_(*p.residual);
  output.copy_(y);
}

at::Tensor MrffiBackend::mrffi(const MrffiArguments& arguments, const std::optional<at::Tensor>& residual) const {
  at::Tensor output = arguments.output();
  if (output.numel() == 0) return output;
  const at::Tensor input = arguments.input.contiguous(at::MemoryFormat::ChannelsLast);
  const std::optional<at::Tensor> added =
      residual ? std::make_optional(residual->contiguous(at::MemoryFormat::ChannelsLast)) : std::nullopt;
  in_parts(input.size(0), input.size(2) * input.size(3), [&](int64_t first, int64_t count) {
    const auto part = [&](const at::Tensor& images) { return images.narrow(0, first, count); };
    run({part(input), arguments.weights, arguments.eps}, added ? std::make_optional(part(*added)) : std::nullopt,
        part(output));
  });
  return output;
}

void MrffiBackend::run(const MrffiArguments& arguments, const std::optional<at::Tensor>& residual,
                       const at::Tensor& output) const {
  const MrffiWeights w(arguments.weights);
  const at::Tensor &input = arguments.input, x = positions(input);
  const int64_t rows = x.size(0), batch = input.size(0), channels = x.size(1), inner = w.inner(), global = w.global();
  const int64_t local = w.local(), rank = w.dt_weight.size(2), state = w.A_log.size(2);
  const at::ScalarType sums = accumulate_type(x.scalar_type());
  const auto matrix = [&](int64_t columns) { return at::empty({rows, columns}, x.options()); };
  const std::optional<at::Tensor> none;

  // all parts write into their channels of one buffer, after the ReLU
  at::Tensor mixed = matrix(channels);
  const at::Tensor x_global = x.narrow(1, 0, global);
  at::Tensor mixed_global = mixed.narrow(1, 0, global);

  at::Tensor expanded = matrix(2 * inner);
  product({x_global, w.in_weight, w.in_bias, none, false, false}, expanded);
  const std::optional<at::Tensor> conv_bias = w.conv_bias;
  const at::Tensor u = positions(depthwise.depthwise_conv2d(
      {image(expanded.narrow(1, 0, inner), input), w.conv_weight, conv_bias, 1, "silu"}, std::nullopt));
  at::Tensor projected = matrix(2 * (rank + 2 * state));
  product({u, w.x_weight, {}, none, false, false}, projected);
  const auto [delta, B, C] = scan_rows(projected, batch, rank, state);
  const at::Tensor y = scan.bidirectional_scan({sequence(u, batch), delta, w.A_log, B, C, w.D, w.dt_weight, w.dt_bias});

  at::Tensor gated = matrix(inner);
  const at::Tensor norm_weight = w.norm_weight.to(sums).contiguous(), norm_bias = w.norm_bias.to(sums).contiguous();
  const at::Tensor z = expanded.narrow(1, inner, inner);
  gate({kernel_dtype(x.scalar_type()), rows, inner, arguments.eps, y.const_data_ptr(), z.const_data_ptr(), 2 * inner,
        norm_weight.const_data_ptr(), norm_bias.const_data_ptr(), gated.mutable_data_ptr()});
  haar.haar_conv2d_into(mixed.mutable_data_ptr(), channels, image(x_global, input), w.wavelet_weight);
  product({gated, w.out_weight, w.out_bias, mixed_global, true, true}, mixed_global);

  if (local > 0) {
    const std::optional<at::Tensor> bias = w.local_bias;
    depthwise.depthwise_conv2d_into(mixed.narrow(1, global, local).mutable_data_ptr(), channels,
                                    {image(x.narrow(1, global, local), input), w.local_weight, bias, 1, "relu"},
                                    w.local_scale, w.local_shift);
  }
  if (const int64_t rest = channels - global - local; rest > 0) {
    at::Tensor mixed_identity = mixed.narrow(1, global + local, rest);
    at::clamp_min_out(mixed_identity, x.narrow(1, global + local, rest), 0);
  }

  const std::optional<at::Tensor> added = residual ? std::make_optional(positions(*residual)) : std::nullopt;
  product({mixed, w.proj_weight, w.proj_bias, added, false, false}, positions(output));
}

MrffiGradients mrffi_backward_composed(const at::Tensor& grad_output, const MrffiArguments& arguments) {
  arguments.check_backward(grad_output);
  const MrffiWeights w(arguments.weights);
  if (arguments.input.numel() == 0) {
    std::vector<at::Tensor> zeros;
    for (const at::Tensor& weight : arguments.weights)
      zeros.push_back(at::zeros(weight.sizes(), weight.options()));
    return {arguments.output(), zeros};
  }
  const at::Tensor input = arguments.input.contiguous(at::MemoryFormat::ChannelsLast), x = positions(input);
  const int64_t batch = input.size(0), channels = x.size(1), inner = w.inner(), global = w.global();
  const int64_t local = w.local(), identity = channels - global - local;
  const int64_t rank = w.dt_weight.size(2), state = w.A_log.size(2), rows = rank + 2 * state;
  const auto in_type = [&](const at::Tensor& bias) { return bias.to(x.scalar_type()); };

  // forward again, keeping what the gradients need
  const at::Tensor in_weight = matrix_of(w.in_weight, 2 * inner, global);
  const at::Tensor x_weight = matrix_of(w.x_weight, 2 * rows, inner);
  const at::Tensor out_weight = matrix_of(w.out_weight, global, inner);
  const at::Tensor proj_weight = matrix_of(w.proj_weight, channels, channels);
  const at::Tensor wavelet_weight = w.wavelet_weight.flatten(0, 1).unsqueeze(1);
  const at::Tensor x_global = x.narrow(1, 0, global), image_global = image(x_global, input);
  const at::Tensor expanded = at::linear(x_global, in_weight, in_type(w.in_bias));
  const at::Tensor before = image(expanded.narrow(1, 0, inner), input), z = expanded.narrow(1, inner, inner);
  const at::Tensor u = positions(depthwise_conv2d(before, w.conv_weight, w.conv_bias, std::nullopt, 1, "silu"));
  const auto [delta, B, C] = scan_rows(at::linear(u, x_weight), batch, rank, state);
  const at::Tensor sequence_u = sequence(u, batch);
  const at::Tensor y =
      bidirectional_scan(sequence_u, delta, w.A_log, B, C, w.D, w.dt_weight, w.dt_bias).transpose(1, 2).flatten(0, 1);
  const at::Tensor norm_weight = in_type(w.norm_weight), norm_bias = in_type(w.norm_bias);
  const auto [normalized, mean, rstd] = at::native_layer_norm(y, {inner}, norm_weight, norm_bias, arguments.eps);
  const at::Tensor gate = at::silu(z), gated = normalized * gate;
  at::Tensor mixed = at::empty_like(x);
  mixed.narrow(1, 0, global)
      .copy_(at::linear(gated, out_weight, in_type(w.out_bias)) + positions(haar_conv2d(image_global, wavelet_weight)));
  const at::Tensor image_local = image(x.narrow(1, global, local), input);
  at::Tensor convolved;
  if (local > 0) {
    convolved = positions(depthwise_conv2d(image_local, w.local_weight, w.local_bias, std::nullopt, 1, "relu"));
    mixed.narrow(1, global, local).copy_(convolved * w.local_scale + w.local_shift);
  }
  mixed.narrow(1, global + local, identity).copy_(x.narrow(1, global + local, identity));
  mixed.relu_();

  // and back
  std::vector<at::Tensor> grads(MrffiWeights::count);
  const auto like = [&](size_t i, const at::Tensor& grad) {
    grads[i] = parameter_gradient(grad, arguments.weights[i]);
  };
  const auto matrix_grads = [&](size_t i, const at::Tensor& grad, const at::Tensor& from) {
    grads[i] = matrix_gradient(at::matmul(grad.t(), from), arguments.weights[i]);
  };
  const at::Tensor grad = positions(grad_output.contiguous(at::MemoryFormat::ChannelsLast));
  matrix_grads(18, grad, mixed);
  like(19, grad.sum(0));
  const at::Tensor grad_mixed = at::threshold_backward(at::matmul(grad, proj_weight), mixed, 0);
  at::Tensor grad_x = at::empty_like(x);
  grad_x.narrow(1, global + local, identity).copy_(grad_mixed.narrow(1, global + local, identity));

  if (local > 0) {
    const at::Tensor g = grad_mixed.narrow(1, global, local);
    like(16, (g * convolved).sum(0));
    like(17, g.sum(0));
    auto [grad_local, grad_weight, grad_bias] = depthwise_conv2d_backward(
        image(in_type(g * w.local_scale), input), image_local, w.local_weight, w.local_bias, 1, "relu");
    grad_x.narrow(1, global, local).copy_(positions(grad_local));
    like(14, grad_weight);
    like(15, grad_bias);
  } else {
    for (size_t i = 14; i < 18; ++i)
      grads[i] = at::zeros(arguments.weights[i].sizes(), arguments.weights[i].options());
  }

  const at::Tensor g = grad_mixed.narrow(1, 0, global).contiguous(), image_g = image(g, input);
  like(13, haar_conv2d_backward_weight(image_g, image_global, wavelet_weight.size(3)));
  matrix_grads(11, g, gated);
  like(12, g.sum(0));
  const at::Tensor grad_gated = at::matmul(g, out_weight);
  const at::Tensor grad_z = at::silu_backward(grad_gated * normalized, z);
  const auto [grad_y, grad_norm_weight, grad_norm_bias] = at::native_layer_norm_backward(
      grad_gated * gate, y, {inner}, mean, rstd, norm_weight, norm_bias, {true, true, true});
  like(9, grad_norm_weight);
  like(10, grad_norm_bias);
  const auto [grad_u, grad_delta, grad_A_log, grad_B, grad_C, grad_D, grad_dt_weight, grad_dt_bias] =
      bidirectional_scan_backward(sequence(grad_y, batch), sequence_u, delta, w.A_log, B, C, w.D, w.dt_weight,
                                  w.dt_bias);
  like(5, grad_dt_weight);
  like(6, grad_dt_bias);
  like(7, grad_A_log);
  like(8, grad_D);
  const at::Tensor grad_rows = at::cat(std::vector<at::Tensor>{grad_delta, grad_B, grad_C}, 2)
                                   .permute({0, 3, 1, 2})
                                   .reshape({x.size(0), 2 * rows});
  matrix_grads(4, grad_rows, u);
  const at::Tensor grad_conv = grad_u.transpose(1, 2).flatten(0, 1) + at::matmul(grad_rows, x_weight);
  const auto [grad_before, grad_conv_weight, grad_conv_bias] =
      depthwise_conv2d_backward(image(grad_conv, input), before, w.conv_weight, w.conv_bias, 1, "silu");
  like(2, grad_conv_weight);
  like(3, grad_conv_bias);
  const at::Tensor grad_expanded = at::cat(std::vector<at::Tensor>{positions(grad_before), grad_z}, 1);
  matrix_grads(0, grad_expanded, x_global);
  like(1, grad_expanded.sum(0));
  grad_x.narrow(1, 0, global)
      .copy_(at::matmul(grad_expanded, in_weight) + positions(haar_conv2d(image_g, wavelet_weight.flip({2, 3}))));
  return {image(grad_x, input), grads};
}

}  // namespace mobilemamba
