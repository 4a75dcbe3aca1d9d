// The host side of the bidirectional scan; see the header.
#include "ops/bidirectional_scan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include "ops/common.h"

namespace mobilemamba {

void ScanArguments::check() const {
  const Checks check("bidirectional_scan", "u", u);
  check.dimensions("u", u, 3, "(batch, channels, length)");
  check.dimensions("delta", delta, 4, "(batch, 2, R, length)");
  check.dimensions("A_log", A_log, 3, "(2, channels, N)");
  const c10::SymInt batch = u.sym_size(0), channels = u.sym_size(1), length = u.sym_size(2);
  const c10::SymInt rank = delta.sym_size(2), state = A_log.sym_size(2);
  check.like_main("delta", delta, {batch, 2, rank, length}, "(batch, 2, R, length)");
  check.parameter("A_log", A_log, {2, channels, state}, "(2, channels, N)");
  check.like_main("B", B, {batch, 2, state, length}, "(batch, 2, N, length)");
  check.like_main("C", C, {batch, 2, state, length}, "(batch, 2, N, length)");
  check.parameter("D", D, {2, channels}, "(2, channels)");
  check.parameter("dt_weight", dt_weight, {2, channels, rank}, "(2, channels, R)");
  check.parameter("dt_bias", dt_bias, {2, channels}, "(2, channels)");
  check.at_least_one("a rank R", rank, "delta", delta);
  check.at_least_one("a state size N", state, "A_log", A_log);
}

void ScanArguments::check_backward(const at::Tensor& grad_y) const {
  check();
  const Checks check("bidirectional_scan_backward", "u", u);
  check.like_main("grad_y", grad_y, u.sym_sizes(), "(batch, channels, length)");
}

at::Tensor scan_output(const at::Tensor& u) {
  return at::empty_symint({u.sym_size(0), u.sym_size(2), u.sym_size(1)}, u.options()).transpose(1, 2);
}

ScanGradients scan_gradients(const ScanArguments& a) {
  return {scan_output(a.u),     empty_parameter(a.delta), empty_parameter(a.A_log),     empty_parameter(a.B),
          empty_parameter(a.C), empty_parameter(a.D),     empty_parameter(a.dt_weight), empty_parameter(a.dt_bias)};
}

namespace {

/// The kernels' view of delta, B or C.
ScanRows kernel_rows(const at::Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

/// The tensors that the kernel parameters point into.
class ScanInputs {
 public:
  explicit ScanInputs(const ScanArguments& a) : u_(channels_contiguous(a.u)), delta_(a.delta), B_(a.B), C_(a.C) {
    const at::ScalarType type = accumulate_type(a.u.scalar_type());
    // channels last: a vector or a warp loads neighbouring channels
    A_log_ = a.A_log.to(type).transpose(1, 2).contiguous();
    dt_weight_ = a.dt_weight.to(type).transpose(1, 2).contiguous();
    D_ = a.D.to(type).contiguous();
    dt_bias_ = a.dt_bias.to(type).contiguous();
  }

  /// Sets all parameters but the outputs.
  void fill(ScanForward& p) const {
    p.dtype = kernel_dtype(u_.scalar_type());
    p.batch = u_.size(0);
    p.channels = u_.size(1);
    p.length = u_.size(2);
    p.rank = delta_.size(2);
    p.state = B_.size(2);
    p.u = u_.const_data_ptr();
    p.u_batch = u_.stride(0);
    p.u_position = u_.stride(2);
    p.delta = kernel_rows(delta_);
    p.B = kernel_rows(B_);
    p.C = kernel_rows(C_);
    p.A_log = A_log_.const_data_ptr();
    p.D = D_.const_data_ptr();
    p.dt_weight = dt_weight_.const_data_ptr();
    p.dt_bias = dt_bias_.const_data_ptr();
  }

 private:
  const at::Tensor u_, delta_, B_, C_;
  at::Tensor A_log_, D_, dt_weight_, dt_bias_;
};

at::Tensor scratch_of(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

}  // namespace

at::Tensor ScanBackend::bidirectional_scan(const ScanArguments& a) const {
  a.check();
  at::Tensor y = scan_output(a.u);
  if (y.numel() == 0) return y;
  const ScanInputs inputs(a);
  ScanForward p{};
  inputs.fill(p);
  p.y = y.mutable_data_ptr();
  const at::Tensor scratch = scratch_of(forward_scratch_bytes(p), a.u);
  p.scratch = scratch.mutable_data_ptr();
  forward(p);
  return y;
}

ScanGradients ScanBackend::bidirectional_scan_backward(const at::Tensor& grad_y, const ScanArguments& a) const {
  a.check_backward(grad_y);
  if (a.u.numel() == 0) return zeroed(scan_gradients(a));
  const ScanInputs inputs(a);
  const at::Tensor grad_y_channels = channels_contiguous(grad_y);
  ScanBackward p{};
  inputs.fill(p);
  p.grad_y = grad_y_channels.const_data_ptr();
  p.grad_y_batch = grad_y_channels.stride(0);
  p.grad_y_position = grad_y_channels.stride(2);
  divide_backward(p);

  const auto sums = a.u.options().dtype(accumulate_type(a.u.scalar_type()));
  at::Tensor grad_u = scan_output(a.u);
  at::Tensor grad_rows = at::empty({p.batch, p.groups(), 2, p.rows(), p.length}, sums);
  at::Tensor grad_params = at::empty({p.batch * p.segments, 2, p.state + p.rank + 2, p.channels}, sums);
  const at::Tensor scratch = scratch_of(backward_scratch_bytes(p), a.u);
  p.grad_u = grad_u.mutable_data_ptr();
  p.grad_rows = grad_rows.mutable_data_ptr();
  p.grad_params = grad_params.mutable_data_ptr();
  p.scratch = scratch.mutable_data_ptr();
  backward(p);

  const auto rows = [&](int64_t first, const at::Tensor& like) {
    return grad_rows.narrow(3, first, like.size(2)).sum(1).to(like.scalar_type());
  };
  const at::Tensor params = grad_params.sum(0);
  const auto parameter = [&](int64_t first, int64_t count, const at::Tensor& like) {
    const at::Tensor grad = params.narrow(1, first, count).transpose(1, 2).to(like.scalar_type());
    return grad.clone(at::MemoryFormat::Contiguous).view(like.sizes());
  };
  return {grad_u,
          rows(0, a.delta),
          parameter(0, p.state, a.A_log),
          rows(p.rank, a.B),
          rows(p.rank + p.state, a.C),
          parameter(p.state + p.rank + 1, 1, a.D),
          parameter(p.state, p.rank, a.dt_weight),
          parameter(p.state + p.rank, 1, a.dt_bias)};
}

}  // namespace mobilemamba
