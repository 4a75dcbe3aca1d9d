// The host side of the MRFFI block; see the header.
#include "ops/mrffi.h"

#include <ATen/TensorOperators.h>
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
#include <ATen/ops/zero.h>

#include "ops/common.h"
#include "ops/matrix.h"

namespace mobilemamba {
namespace {

using Kind = MrffiWeight::Kind;
using Sizes = c10::SmallVector<c10::SymInt, 3>;
using W = MrffiWeights;

Sizes per_inner(const MrffiSizes& s) {
  return {s.inner};
}

Sizes per_global(const MrffiSizes& s) {
  return {s.global};
}

Sizes per_local(const MrffiSizes& s) {
  return {s.local};
}

Sizes per_direction(const MrffiSizes& s) {
  return {2, s.inner};
}

}  // namespace

constinit const std::array<MrffiWeight, 20> mrffi_weights = {{
    {"in_weight", &W::in_weight, Kind::matrix, "(2 * D, G)",
     [](const MrffiSizes& s) -> Sizes { return {s.inner * 2, s.global}; }},
    {"in_bias", &W::in_bias, Kind::parameter, "(2 * D)", [](const MrffiSizes& s) -> Sizes { return {s.inner * 2}; }},
    {"conv_weight", &W::conv_weight, Kind::kernel, "(D, 1, k, k)",
     [](const MrffiSizes& s) -> Sizes { return {s.inner, 1}; }},
    {"conv_bias", &W::conv_bias, Kind::parameter, "(D)", per_inner},
    {"x_weight", &W::x_weight, Kind::matrix, "(2 * (R + 2N), D)",
     [](const MrffiSizes& s) -> Sizes { return {(s.rank + s.state * 2) * 2, s.inner}; }},
    {"dt_weight", &W::dt_weight, Kind::parameter, "(2, D, R)",
     [](const MrffiSizes& s) -> Sizes { return {2, s.inner, s.rank}; }},
    {"dt_bias", &W::dt_bias, Kind::parameter, "(2, D)", per_direction},
    {"A_log", &W::A_log, Kind::parameter, "(2, D, N)",
     [](const MrffiSizes& s) -> Sizes { return {2, s.inner, s.state}; }},
    {"D", &W::D, Kind::parameter, "(2, D)", per_direction},
    {"norm_weight", &W::norm_weight, Kind::parameter, "(D)", per_inner},
    {"norm_bias", &W::norm_bias, Kind::parameter, "(D)", per_inner},
    {"out_weight", &W::out_weight, Kind::matrix, "(G, D)",
     [](const MrffiSizes& s) -> Sizes { return {s.global, s.inner}; }},
    {"out_bias", &W::out_bias, Kind::parameter, "(G)", per_global},
    {"wavelet_weight", &W::wavelet_weight, Kind::kernel, "(G, 4, k, k)",
     [](const MrffiSizes& s) -> Sizes { return {s.global, 4}; }},
    {"local_weight", &W::local_weight, Kind::kernel, "(P, 1, k, k)",
     [](const MrffiSizes& s) -> Sizes { return {s.local, 1}; }},
    {"local_bias", &W::local_bias, Kind::parameter, "(P)", per_local},
    {"local_scale", &W::local_scale, Kind::parameter, "(P)", per_local},
    {"local_shift", &W::local_shift, Kind::parameter, "(P)", per_local},
    {"proj_weight", &W::proj_weight, Kind::matrix, "(C, C)",
     [](const MrffiSizes& s) -> Sizes { return {s.channels, s.channels}; }},
    {"proj_bias", &W::proj_bias, Kind::parameter, "(C)", [](const MrffiSizes& s) -> Sizes { return {s.channels}; }},
}};

MrffiWeights::MrffiWeights(at::TensorList list) {
  TORCH_CHECK(list.size() == mrffi_weights.size(), "mrffi: weights has ", list.size(), " tensors, expected ",
              mrffi_weights.size());
  for (size_t i = 0; i < list.size(); ++i)
    this->*mrffi_weights[i].tensor = list[i];
}

std::vector<at::Tensor> MrffiWeights::list() const {
  std::vector<at::Tensor> tensors;
  for (const MrffiWeight& weight : mrffi_weights)
    tensors.push_back(this->*weight.tensor);
  return tensors;
}

void MrffiArguments::check(const std::optional<at::Tensor>& residual) const {
  const Checks check("mrffi", "input", input);
  const MrffiWeights& w = weights;
  check.dimensions("input", input, 4, image_layout);
  check.dimensions("dt_weight", w.dt_weight, 3, "(2, D, R)");
  check.dimensions("A_log", w.A_log, 3, "(2, D, N)");
  check.dimensions("out_bias", w.out_bias, 1, "(G)");
  check.dimensions("local_bias", w.local_bias, 1, "(P)");
  const MrffiSizes sizes = {
      .channels = input.sym_size(1),
      .global = w.out_bias.sym_size(0),
      .local = w.local_bias.sym_size(0),
      .inner = w.A_log.sym_size(1),
      .rank = w.dt_weight.sym_size(2),
      .state = w.A_log.sym_size(2),
  };
  check.at_least_one("an inner width D", sizes.inner, "A_log", w.A_log);
  TORCH_SYM_CHECK((sizes.global + sizes.local).sym_le(sizes.channels), "mrffi: input has ", sizes.channels,
                  " channels, expected at least the ", sizes.global, " of out_bias and the ", sizes.local,
                  " of local_bias");
  check.at_least_one("a rank R", sizes.rank, "dt_weight", w.dt_weight);
  check.at_least_one("a state size N", sizes.state, "A_log", w.A_log);
  for (const MrffiWeight& weight : mrffi_weights) {
    const at::Tensor& tensor = w.*weight.tensor;
    const Sizes expected = weight.sizes(sizes);
    if (weight.kind == Kind::matrix)
      check_matrix(check, weight.name, tensor, expected[0], expected[1]);
    else if (weight.kind == Kind::kernel)
      check.kernel(weight.name, tensor, expected[0], expected[1].expect_int(), weight.layout);
    else
      check.parameter(weight.name, tensor, expected, weight.layout);
  }
  if (residual) check.like_main("residual", *residual, input.sym_sizes(), image_layout);
}

void MrffiArguments::check_backward(const at::Tensor& grad_output) const {
  check(std::nullopt);
  const Checks check("mrffi_backward", "input", input);
  check.like_main("grad_output", grad_output, input.sym_sizes(), image_layout);
}

MrffiGradients MrffiArguments::gradients() const {
  std::vector<at::Tensor> grads = weights.list();
  for (at::Tensor& grad : grads)
    grad = empty_parameter(grad);
  return {empty_image(input), grads};
}

namespace {

/// delta, B and C of the scan: the slices of the projection (positions, 2 * (R + 2N)).
std::array<at::Tensor, 3> scan_rows(const at::Tensor& projected, int64_t batch, int64_t rank, int64_t state) {
  const at::Tensor rows = projected.view({batch, -1, 2, rank + 2 * state}).permute({0, 2, 3, 1});
  return {rows.narrow(2, 0, rank), rows.narrow(2, rank, state), rows.narrow(2, rank + state, state)};
}

at::Tensor sequence(const at::Tensor& positions, int64_t batch) {
  return positions.view({batch, -1, positions.size(1)}).transpose(1, 2);
}

}  // namespace

at::Tensor MrffiBackend::mrffi(const MrffiArguments& arguments, const std::optional<at::Tensor>& residual) const {
  at::Tensor output = empty_image(arguments.input);
  if (output.numel() == 0) return output;
  const at::Tensor input = arguments.input.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor added = residual ? residual->contiguous(at::MemoryFormat::ChannelsLast) : at::Tensor();
  in_parts(input.size(0), input.size(2) * input.size(3), [&](int64_t first, int64_t count) {
    const auto part = [&](const at::Tensor& images) { return images.narrow(0, first, count); };
    run(part(input), added.defined() ? part(added) : added, arguments.weights, arguments.eps, part(output));
  });
  return output;
}

void MrffiBackend::run(const at::Tensor& input, const at::Tensor& residual, const MrffiWeights& w, double eps,
                       const at::Tensor& output) const {
  const at::Tensor x = positions(input);
  const int64_t rows = x.size(0), batch = input.size(0), channels = x.size(1), inner = w.inner(), global = w.global();
  const int64_t local = w.local(), rank = w.rank(), state = w.state();
  const at::ScalarType sums = accumulate_type(x.scalar_type());
  const auto matrix = [&](int64_t columns) { return at::empty({rows, columns}, x.options()); };

  // every part writes its channels of one buffer and applies the ReLU itself
  at::Tensor mixed = matrix(channels);
  const at::Tensor x_global = x.narrow(1, 0, global);
  at::Tensor mixed_global = mixed.narrow(1, 0, global);

  at::Tensor expanded = matrix(2 * inner);
  product({.input = x_global, .weight = w.in_weight, .bias = w.in_bias}, expanded);
  at::Tensor u, projected = matrix(2 * (rank + 2 * state));
  const auto convolve_and_project = [&] {
    if (!conv_product || w.x_weight.dim() != 4 || w.conv_weight.size(3) != 3) return false;
    const at::Tensor weight = w.x_weight.contiguous(), bias = w.conv_bias.to(sums).contiguous();
    const at::Tensor conv_weight = channels_last_weight(w.conv_weight, sums);
    u = matrix(inner);
    return conv_product({
        .dtype = kernel_dtype(x.scalar_type()),
        .batch = batch,
        .height = input.size(2),
        .width = input.size(3),
        .channels = inner,
        .input = expanded.const_data_ptr(),
        .input_row = 2 * inner,
        .conv_weight = conv_weight.const_data_ptr(),
        .conv_bias = bias.const_data_ptr(),
        .activated = u.mutable_data_ptr(),
        .out_channels = projected.size(1),
        .product_weight = weight.const_data_ptr(),
        .output = projected.mutable_data_ptr(),
    });
  };
  if (!convolve_and_project()) {
    u = positions(depthwise.depthwise_conv2d(
        {image(expanded.narrow(1, 0, inner), input), w.conv_weight, w.conv_bias, 1, "silu"}, std::nullopt));
    product({.input = u, .weight = w.x_weight}, projected);
  }
  const auto [delta, B, C] = scan_rows(projected, batch, rank, state);
  const at::Tensor y = scan.bidirectional_scan({sequence(u, batch), delta, w.A_log, B, C, w.D, w.dt_weight, w.dt_bias});

  haar.haar_conv2d_into(mixed.mutable_data_ptr(), channels, image(x_global, input), w.wavelet_weight);
  const at::Tensor norm_weight = w.norm_weight.to(sums).contiguous(), norm_bias = w.norm_bias.to(sums).contiguous();
  const at::Tensor z = expanded.narrow(1, inner, inner);
  GateForward gate_forward = {kernel_dtype(x.scalar_type()),
                              rows,
                              inner,
                              eps,
                              y.const_data_ptr(),
                              z.const_data_ptr(),
                              2 * inner,
                              norm_weight.const_data_ptr(),
                              norm_bias.const_data_ptr(),
                              nullptr};
  const int64_t identity = channels - global - local;
  const at::Tensor x_identity = x.narrow(1, global + local, identity);
  at::Tensor mixed_identity = mixed.narrow(1, global + local, identity);
  const auto gate_and_project = [&] {
    if (!gate_product || w.out_weight.dim() != 4) return false;
    const at::Tensor weight = w.out_weight.contiguous(), bias = w.out_bias.to(sums).contiguous();
    return gate_product({
        .gate = gate_forward,
        .out_channels = global,
        .product_weight = weight.const_data_ptr(),
        .product_bias = bias.const_data_ptr(),
        .output = mixed_global.mutable_data_ptr(),
        .identity_channels = identity,
        .identity = x_identity.const_data_ptr(),
        .identity_row = channels,
        .identity_output = mixed_identity.mutable_data_ptr(),
        .output_row = channels,
    });
  };
  if (!gate_and_project()) {
    at::Tensor gated = matrix(inner);
    gate_forward.output = gated.mutable_data_ptr();
    gate(gate_forward);
    product({.input = gated,
             .weight = w.out_weight,
             .bias = w.out_bias,
             .residual = mixed_global,
             .residual_inside = true,
             .relu = true},
            mixed_global);
    if (identity > 0) at::clamp_min_out(mixed_identity, x_identity, 0);
  }

  if (local > 0) {
    depthwise.depthwise_conv2d_into(mixed.narrow(1, global, local).mutable_data_ptr(), channels,
                                    {image(x.narrow(1, global, local), input), w.local_weight, w.local_bias, 1, "relu"},
                                    w.local_scale, w.local_shift);
  }

  const at::Tensor added = residual.defined() ? positions(residual) : residual;
  product({.input = mixed, .weight = w.proj_weight, .bias = w.proj_bias, .residual = added}, positions(output));
}

MrffiGradients mrffi_backward_composed(const at::Tensor& grad_output, const MrffiArguments& arguments) {
  arguments.check_backward(grad_output);
  if (arguments.input.numel() == 0) {
    const MrffiGradients zeros = arguments.gradients();
    for (const at::Tensor& grad : std::get<1>(zeros))
      grad.zero_();
    return zeros;
  }
  const MrffiWeights& w = arguments.weights;
  const at::Tensor input = arguments.input.contiguous(at::MemoryFormat::ChannelsLast), x = positions(input);
  const int64_t batch = input.size(0), channels = x.size(1), inner = w.inner(), global = w.global();
  const int64_t local = w.local(), identity = channels - global - local;
  const int64_t rank = w.rank(), state = w.state(), rows = rank + 2 * state;
  const auto in_type = [&](const at::Tensor& bias) { return bias.to(x.scalar_type()); };

  // the forward pass again, which keeps the activations for the gradients
  const at::Tensor in_weight = plain_matrix(w.in_weight, 2 * inner, global);
  const at::Tensor x_weight = plain_matrix(w.x_weight, 2 * rows, inner);
  const at::Tensor out_weight = plain_matrix(w.out_weight, global, inner);
  const at::Tensor proj_weight = plain_matrix(w.proj_weight, channels, channels);
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

  // the backward pass
  MrffiWeights grads;
  const auto like = [&](at::Tensor W::* weight, const at::Tensor& grad) {
    grads.*weight = parameter_gradient(grad, w.*weight);
  };
  const auto matrix_grads = [&](at::Tensor W::* weight, const at::Tensor& grad, const at::Tensor& from) {
    grads.*weight = matrix_gradient(at::matmul(grad.t(), from), w.*weight);
  };
  const at::Tensor grad = positions(grad_output.contiguous(at::MemoryFormat::ChannelsLast));
  matrix_grads(&W::proj_weight, grad, mixed);
  like(&W::proj_bias, grad.sum(0));
  const at::Tensor grad_mixed = at::threshold_backward(at::matmul(grad, proj_weight), mixed, 0);
  at::Tensor grad_x = at::empty_like(x);
  grad_x.narrow(1, global + local, identity).copy_(grad_mixed.narrow(1, global + local, identity));

  if (local > 0) {
    const at::Tensor g = grad_mixed.narrow(1, global, local);
    like(&W::local_scale, (g * convolved).sum(0));
    like(&W::local_shift, g.sum(0));
    auto [grad_local, grad_weight, grad_bias] = depthwise_conv2d_backward(
        image(in_type(g * w.local_scale), input), image_local, w.local_weight, w.local_bias, 1, "relu");
    grad_x.narrow(1, global, local).copy_(positions(grad_local));
    like(&W::local_weight, grad_weight);
    like(&W::local_bias, grad_bias);
  } else {
    for (at::Tensor W::* weight : {&W::local_weight, &W::local_bias, &W::local_scale, &W::local_shift})
      grads.*weight = empty_parameter(w.*weight).zero_();
  }

  const at::Tensor g = grad_mixed.narrow(1, 0, global).contiguous(), image_g = image(g, input);
  like(&W::wavelet_weight, haar_conv2d_backward_weight(image_g, image_global, wavelet_weight.size(3)));
  matrix_grads(&W::out_weight, g, gated);
  like(&W::out_bias, g.sum(0));
  const at::Tensor grad_gated = at::matmul(g, out_weight);
  const at::Tensor grad_z = at::silu_backward(grad_gated * normalized, z);
  const auto [grad_y, grad_norm_weight, grad_norm_bias] = at::native_layer_norm_backward(
      grad_gated * gate, y, {inner}, mean, rstd, norm_weight, norm_bias, {true, true, true});
  like(&W::norm_weight, grad_norm_weight);
  like(&W::norm_bias, grad_norm_bias);
  const auto [grad_u, grad_delta, grad_A_log, grad_B, grad_C, grad_D, grad_dt_weight, grad_dt_bias] =
      bidirectional_scan_backward(sequence(grad_y, batch), sequence_u, delta, w.A_log, B, C, w.D, w.dt_weight,
                                  w.dt_bias);
  like(&W::dt_weight, grad_dt_weight);
  like(&W::dt_bias, grad_dt_bias);
  like(&W::A_log, grad_A_log);
  like(&W::D, grad_D);
  const at::Tensor grad_rows = at::cat(std::vector<at::Tensor>{grad_delta, grad_B, grad_C}, 2)
                                   .permute({0, 3, 1, 2})
                                   .reshape({x.size(0), 2 * rows});
  matrix_grads(&W::x_weight, grad_rows, u);
  const at::Tensor grad_conv = grad_u.transpose(1, 2).flatten(0, 1) + at::matmul(grad_rows, x_weight);
  const auto [grad_before, grad_conv_weight, grad_conv_bias] =
      depthwise_conv2d_backward(image(grad_conv, input), before, w.conv_weight, w.conv_bias, 1, "silu");
  like(&W::conv_weight, grad_conv_weight);
  like(&W::conv_bias, grad_conv_bias);
  const at::Tensor grad_expanded = at::cat(std::vector<at::Tensor>{positions(grad_before), grad_z}, 1);
  matrix_grads(&W::in_weight, grad_expanded, x_global);
  like(&W::in_bias, grad_expanded.sum(0));
  grad_x.narrow(1, 0, global)
      .copy_(at::matmul(grad_expanded, in_weight) + positions(haar_conv2d(image_g, wavelet_weight.flip({2, 3}))));
  return {image(grad_x, input), grads.list()};
}

}  // namespace mobilemamba
