// The CPU kernels without torch, on random shapes, strides and types, against references in float64. They are compiled
// for any processor, for an emulator too: .ci/run runs this on aarch64.
//   test_kernels [TRIALS]    prints the instruction set; exits with 1 if anything is wrong
#include <cstdlib>

#include "arrays.h"

using namespace mobilemamba;

namespace {

const cpu::Kernels& kernels = cpu::kernels();

std::string title(const char* operator_name, DType type, std::initializer_list<int64_t> sizes) {
  std::string text = std::string(operator_name) + " " + name_of(type);
  for (const int64_t size : sizes)
    text += " " + std::to_string(size);
  return text;
}

double activated(Activation activation, double x) {
  return activation == Activation::relu   ? std::max(x, 0.0)
         : activation == Activation::silu ? x / (1 + std::exp(-x))
                                          : x;
}

double derivative(Activation activation, double x) {
  const double s = 1 / (1 + std::exp(-x));
  return activation == Activation::relu ? (x > 0 ? 1 : 0) : activation == Activation::silu ? s * (1 + x * (1 - s)) : 1;
}

// Convolutions of planes --------------------------------------------------------------------------------------------

DepthwiseSizes random_sizes(DType type, Random& random) {
  const int64_t kernel = 2 * random.between(0, 4) + 1, stride = random.between(1, 3);
  return {type,  random.between(1, 3), random.between(1, 75), random.between(1, 21), random.between(1, 12), kernel,
          stride};
}

/// Calls f(y, x, in_y, in_x, tap) for each element of the output and each tap of the kernel that is over the image.
template <typename Sizes, typename F>
void for_taps(const Sizes& p, F f) {
  for (int64_t y = 0; y < p.out_height(); ++y)
    for (int64_t x = 0; x < p.out_width(); ++x)
      for (int64_t tap = 0; tap < p.kernel * p.kernel; ++tap) {
        const int64_t in_y = y * p.stride - p.kernel / 2 + tap / p.kernel;
        const int64_t in_x = x * p.stride - p.kernel / 2 + tap % p.kernel;
        if (in_y >= 0 && in_y < p.height && in_x >= 0 && in_x < p.width) f(y, x, in_y, in_x, tap);
      }
}

/// Adds the convolution of `in` to `out`; the weight is (planes, taps, 1, C).
void convolve(const DepthwiseSizes& p, const Array& in, const Array& weight, int64_t plane, Array& out) {
  for (int64_t b = 0; b < p.batch; ++b)
    for_taps(p, [&](int64_t y, int64_t x, int64_t in_y, int64_t in_x, int64_t tap) {
      for (int64_t c = 0; c < p.channels; ++c)
        out(b, y, x, c) += in(b, in_y, in_x, c) * weight(plane, tap, 0, c);
    });
}

/// Adds the weight's gradient of images [first, last) to `sums`, (slabs, entries, 1, C), from entry `entry` on.
void correlate(const DepthwiseSizes& p, const Array& in, const Array& grad, int64_t slabs, int64_t entry, Array& sums) {
  for (int64_t slab = 0; slab < slabs; ++slab)
    for (int64_t b = p.batch * slab / slabs; b < p.batch * (slab + 1) / slabs; ++b)
      for_taps(p, [&](int64_t y, int64_t x, int64_t in_y, int64_t in_x, int64_t tap) {
        for (int64_t c = 0; c < p.channels; ++c)
          sums(slab, entry + tap, 0, c) += in(b, in_y, in_x, c) * grad(b, y, x, c);
      });
}

void test_depthwise(DType type, Random& random) {
  const DepthwiseSizes p = random_sizes(type, random);
  const auto what = [&](const char* name) {
    return title(name, type, {p.batch, p.channels, p.height, p.width, p.kernel, p.stride});
  };
  const DType acc = accumulator(type);
  const std::array<int64_t, 4> in_size = {p.batch, p.height, p.width, p.channels};
  const std::array<int64_t, 4> out_size = {p.batch, p.out_height(), p.out_width(), p.channels};
  const int64_t gap = random.between(0, 5), taps = p.kernel * p.kernel;
  const Array in(type, in_size, gap, random), grad(type, out_size, gap, random), residual(type, out_size, gap, random);
  const Array weight(acc, {1, taps, 1, p.channels}, 0, random), bias(acc, {1, 1, 1, p.channels}, 0, random);
  const Array scale(acc, {1, 1, 1, p.channels}, 0, random), shift(acc, {1, 1, 1, p.channels}, 0, random);

  Array out(type, {1, 1, p.batch * p.out_height() * p.out_width(), p.channels}, gap), sums(DType::float64, out_size);
  DepthwiseForward forward{p,
                           static_cast<Activation>(random.between(0, 2)),
                           in.image(),
                           weight.data(),
                           nullptr,
                           {},
                           {},
                           nullptr,
                           nullptr,
                           out.data(),
                           out.stride[2]};
  if (random.coin()) forward.bias = bias.data();
  if (random.coin()) forward.residual = residual.image();
  if (random.coin()) forward.scale = scale.data(), forward.shift = shift.data();
  if (random.between(0, 3) == 0) forward.grad_output = grad.image(), forward.residual = {}, forward.scale = nullptr;
  convolve(p, in, weight, 0, sums);
  for (int64_t b = 0, i = 0; b < p.batch; ++b)
    for (int64_t y = 0; y < p.out_height(); ++y)
      for (int64_t x = 0; x < p.out_width(); ++x, ++i)
        for (int64_t c = 0; c < p.channels; ++c) {
          const double sum = sums(b, y, x, c) + (forward.bias ? bias(0, 0, 0, c) : 0);
          double value = forward.grad_output.data ? grad(b, y, x, c) * derivative(forward.activation, sum)
                                                  : activated(forward.activation, sum);
          if (forward.residual.data) value += residual(b, y, x, c);
          if (forward.scale) value = std::max(value * scale(0, 0, 0, c) + shift(0, 0, 0, c), 0.0);
          out(0, 0, i, c) = value;
        }
  run(what("depthwise"), kernels.depthwise_forward, forward, {&out});
  out.check(what("depthwise"));

  Array grad_in(type, in_size);
  for (int64_t b = 0; b < p.batch; ++b)
    for_taps(p, [&](int64_t y, int64_t x, int64_t in_y, int64_t in_x, int64_t tap) {
      for (int64_t c = 0; c < p.channels; ++c)
        grad_in(b, in_y, in_x, c) += grad(b, y, x, c) * weight(0, tap, 0, c);
    });
  const DepthwiseBackwardInput backward{p, grad.image(), weight.data(), grad_in.data()};
  run(what("depthwise, gradient of the input"), kernels.depthwise_backward_input, backward, {&grad_in});
  grad_in.check(what("depthwise, gradient of the input"));

  const int64_t slabs = random.between(1, p.batch);
  Array grad_weight(acc, {slabs, taps + 1, 1, p.channels});
  correlate(p, in, grad, slabs, 0, grad_weight);
  for (int64_t slab = 0; slab < slabs; ++slab)
    for (int64_t b = p.batch * slab / slabs; b < p.batch * (slab + 1) / slabs; ++b)
      for (int64_t i = 0; i < p.out_height() * p.out_width() * p.channels; ++i)
        grad_weight(slab, taps, 0, i % p.channels) += grad(b, 0, 0, i);
  const DepthwiseBackwardWeight to_weight{p, slabs, grad.image(), in.image(), grad_weight.data()};
  run(what("depthwise, gradient of the weight"), kernels.depthwise_backward_weight, to_weight, {&grad_weight});
  grad_weight.check(what("depthwise, gradient of the weight"));
}

/// The sign of pixel i of a block of 2 x 2 in a band of the Haar transform, which is its own inverse.
constexpr double haar_signs[4][4] = {{1, 1, 1, 1}, {1, 1, -1, -1}, {1, -1, 1, -1}, {1, -1, -1, 1}};

Array haar_band(const HaarSizes& p, const Array& image, int64_t band) {
  Array result(DType::float64, {p.batch, p.band_height(), p.band_width(), p.channels});
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t y = 0; y < p.height; ++y)
      for (int64_t x = 0; x < p.width; ++x)
        for (int64_t c = 0; c < p.channels; ++c)
          result(b, y / 2, x / 2, c) += 0.5 * haar_signs[band][y % 2 * 2 + x % 2] * image(b, y, x, c);
  return result;
}

void test_haar(DType type, Random& random) {
  const DepthwiseSizes s = random_sizes(type, random);
  const HaarSizes p{type, s.batch, s.channels, 2 * s.height - random.between(0, 1), s.width, s.kernel};
  const DepthwiseSizes plane{type, p.batch, p.channels, p.band_height(), p.band_width(), p.kernel, 1};
  const auto what = [&](const char* name) {
    return title(name, type, {p.batch, p.channels, p.height, p.width, p.kernel});
  };
  const int64_t gap = random.between(0, 5), taps = p.kernel * p.kernel, slabs = random.between(1, p.batch);
  const std::array<int64_t, 4> size = {p.batch, p.height, p.width, p.channels};
  const Array in(type, size, gap, random), grad(type, size, gap, random);
  const Array weight(accumulator(type), {4, taps, 1, p.channels}, 0, random);
  Array out(type, {1, 1, p.batch * p.height * p.width, p.channels}, gap);
  Array grad_weight(accumulator(type), {slabs, 4 * taps, 1, p.channels});
  for (int64_t band = 0; band < 4; ++band) {
    const Array bands = haar_band(p, in, band);
    Array convolved(DType::float64, bands.size);
    convolve(plane, bands, weight, band, convolved);
    correlate(plane, bands, haar_band(p, grad, band), slabs, band * taps, grad_weight);
    for (int64_t i = 0; i < p.batch * p.height * p.width; ++i) {
      const int64_t x = i % p.width, y = i / p.width % p.height, b = i / p.width / p.height;
      for (int64_t c = 0; c < p.channels; ++c)
        out(0, 0, i, c) += 0.5 * haar_signs[band][y % 2 * 2 + x % 2] * convolved(b, y / 2, x / 2, c);
    }
  }
  run(what("haar"), kernels.haar_forward, {p, in.image(), weight.data(), out.data(), out.stride[2]}, {&out});
  out.check(what("haar"));
  run(what("haar, gradient of the weight"), kernels.haar_backward_weight,
      {p, slabs, grad.image(), in.image(), grad_weight.data()}, {&grad_weight});
  grad_weight.check(what("haar, gradient of the weight"));
}

// The scan ----------------------------------------------------------------------------------------------------------

/// delta, B or C: (B, 2, rows, L), stored with the positions or with the rows adjacent.
struct Coefficients {
  bool rows_adjacent;
  Array array;

  Coefficients(DType type, int64_t batch, int64_t rows, int64_t length, Random& random)
      : rows_adjacent(random.coin()),
        array(type, {batch, 2, rows_adjacent ? length : rows, rows_adjacent ? rows : length}, random.between(0, 3),
              random) {}
  double operator()(int64_t b, int64_t k, int64_t row, int64_t t) const {
    return rows_adjacent ? array(b, k, t, row) : array(b, k, row, t);
  }
  ScanRows rows() const {
    const int64_t inner = array.stride[2];
    return {array.data(), array.stride[0], array.stride[1], rows_adjacent ? 1 : inner, rows_adjacent ? inner : 1};
  }
};

void test_scan(DType type, Random& random) {
  const int64_t batch = random.between(1, 2), channels = random.between(1, 150), length = random.between(1, 140);
  const int64_t rank = random.between(0, 4), state = random.between(0, 2) ? 1 : random.between(2, 4);
  const DType acc = accumulator(type);
  const int64_t gap = random.between(0, 5);
  const Array u(type, {batch, 1, length, channels}, gap, random), grad_y(type, u.size, gap, random);
  const Coefficients delta(type, batch, rank, length, random), B(type, batch, state, length, random),
      C(type, batch, state, length, random);
  const Array A_log(acc, {2, state, 1, channels}, 0, random), D(acc, {2, 1, 1, channels}, 0, random);
  const Array dt_weight(acc, {2, rank, 1, channels}, 0, random), dt_bias(acc, {2, 1, 1, channels}, 0, random, -3, 1);
  Array y(type, {batch, 1, length, channels}), grad_u(type, y.size);
  ScanBackward p{};
  static_cast<ScanForward&>(p) = {type,         batch,       channels,         length,         rank,     state,
                                  u.data(),     u.stride[0], u.stride[2],      delta.rows(),   B.rows(), C.rows(),
                                  A_log.data(), D.data(),    dt_weight.data(), dt_bias.data(), y.data(), nullptr};
  p.grad_y = grad_y.data();
  p.grad_y_batch = grad_y.stride[0], p.grad_y_position = grad_y.stride[2];
  p.grad_u = grad_u.data();
  p.group_channels = cpu::scan_group_channels, p.segments = cpu::scan_segments;
  Array grad_rows(acc, {batch * p.groups(), 2, rank + 2 * state, length});
  Array grad_params(acc, {batch, 2, state + rank + 2, channels});
  p.grad_rows = grad_rows.data(), p.grad_params = grad_params.data();

  std::vector<double> x(length), h((length + 1) * state), carry(state);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < 2; ++k)
      for (int64_t c = 0; c < channels; ++c) {
        const auto position = [&](int64_t i) { return k == 0 ? i : length - 1 - i; };
        const auto dt = [&](int64_t i) { return std::log1p(std::exp(x[i])); };
        const auto A = [&](int64_t n) { return -std::exp(A_log(k, n, 0, c)); };
        std::fill(h.begin(), h.end(), 0);
        for (int64_t i = 0; i < length; ++i) {
          const int64_t t = position(i);
          x[i] = dt_bias(k, 0, 0, c);
          for (int64_t r = 0; r < rank; ++r)
            x[i] += dt_weight(k, r, 0, c) * delta(b, k, r, t);
          y(b, 0, t, c) += D(k, 0, 0, c) * u(b, 0, t, c);
          for (int64_t n = 0; n < state; ++n) {
            double& next = h[(i + 1) * state + n];
            next = std::exp(dt(i) * A(n)) * h[i * state + n] + dt(i) * B(b, k, n, t) * u(b, 0, t, c);
            y(b, 0, t, c) += C(b, k, n, t) * next;
          }
        }
        std::fill(carry.begin(), carry.end(), 0);
        const int64_t group = b * p.groups() + c / p.group_channels;
        for (int64_t i = length - 1; i >= 0; --i) {
          const int64_t t = position(i);
          const double g = grad_y(b, 0, t, c), u_t = u(b, 0, t, c), step = dt(i);
          double grad_dt = 0;
          grad_u(b, 0, t, c) += D(k, 0, 0, c) * g;
          grad_params(b, k, state + rank + 1, c) += g * u_t;
          for (int64_t n = 0; n < state; ++n) {
            const double before = h[i * state + n], decay = std::exp(step * A(n)),
                         grad_h = g * C(b, k, n, t) + carry[n];
            grad_rows(group, k, rank + state + n, t) += g * h[(i + 1) * state + n];
            grad_rows(group, k, rank + n, t) += grad_h * step * u_t;
            grad_u(b, 0, t, c) += grad_h * step * B(b, k, n, t);
            grad_dt += grad_h * (u_t * B(b, k, n, t) + before * decay * A(n));
            grad_params(b, k, n, c) += grad_h * before * decay * step * A(n);
            carry[n] = grad_h * decay;
          }
          const double grad_x = grad_dt / (1 + std::exp(-x[i]));
          for (int64_t r = 0; r < rank; ++r) {
            grad_params(b, k, state + r, c) += grad_x * delta(b, k, r, t);
            grad_rows(group, k, r, t) += grad_x * dt_weight(k, r, 0, c);
          }
          grad_params(b, k, state + rank, c) += grad_x;
        }
      }
  const std::string what = title("scan", type, {batch, channels, length, rank, state});
  run<ScanForward>(what, kernels.scan_forward, p, {&y});
  y.check(what);
  run(what + ", backward", kernels.scan_backward, p, {&grad_u, &grad_rows, &grad_params});
  grad_u.check(what + ", gradient of u");
  grad_rows.check(what + ", gradients of delta, B, C");
  grad_params.check(what + ", gradients of parameters");
}

// Norms and the gate ------------------------------------------------------------------------------------------------

void test_gate(DType type, Random& random) {
  const int64_t rows = random.between(1, 40), channels = random.between(1, 150);
  const Array y(type, {1, 1, rows, channels}, 0, random), z(type, y.size, random.between(0, 5), random, -4, 4);
  const Array weight(accumulator(type), {1, 1, 1, channels}, 0, random),
      bias(accumulator(type), weight.size, 0, random);
  Array out(type, y.size);
  constexpr double eps = 1e-3;
  for (int64_t row = 0; row < rows; ++row) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c)
      mean += y(0, 0, row, c) / static_cast<double>(channels);
    for (int64_t c = 0; c < channels; ++c)
      variance += std::pow(y(0, 0, row, c) - mean, 2) / static_cast<double>(channels);
    for (int64_t c = 0; c < channels; ++c)
      out(0, 0, row, c) =
          ((y(0, 0, row, c) - mean) / std::sqrt(variance + eps) * weight(0, 0, 0, c) + bias(0, 0, 0, c)) *
          activated(Activation::silu, z(0, 0, row, c));
  }
  const std::string what = title("gate", type, {rows, channels});
  run(what, kernels.gate_forward,
      {type, rows, channels, eps, y.data(), z.data(), z.stride[2], weight.data(), bias.data(), out.data()}, {&out});
  out.check(what);
}

void test_norm(DType type, Random& random) {
  const NormSizes p{type, random.between(1, 300), random.between(1, 75)};
  const DType acc = accumulator(type);
  const Activation activation = random.coin() ? Activation::relu : Activation::none;
  const bool has_residual = random.coin();
  const std::array<int64_t, 4> size = {1, 1, p.rows, p.channels}, one = {1, 1, 1, p.channels};
  const Array in(type, size, random.between(0, 5), random, 2, 4), grad(type, size, random.between(0, 5), random);
  const Array residual(type, size, random.between(0, 5), random);
  const Array scale(acc, one, 0, random), shift(acc, one, 0, random), mean(acc, one, 0, random);
  const Array slope(acc, one, 0, random), offset(acc, one, 0, random);
  Array out(type, size), grad_in(type, size), moments(acc, {p.blocks(), 2, 1, p.channels}), sums(acc, moments.size);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t row = 0; row < p.rows; ++row) {
      const int64_t block = row / NormSizes::block_rows, first = block * NormSizes::block_rows;
      const double x = in(0, 0, row, c), centred = x - mean(0, 0, 0, c);
      // in float32 as in the kernel: the sign of the sum decides about the gradient
      const double y = type == DType::float64 ? x * scale(0, 0, 0, c) + shift(0, 0, 0, c)
                                              : std::fma(static_cast<float>(x), static_cast<float>(scale(0, 0, 0, c)),
                                                         static_cast<float>(shift(0, 0, 0, c)));
      const double g = grad(0, 0, row, c) * derivative(activation, y);
      out(0, 0, row, c) = activated(activation, y) + (has_residual ? residual(0, 0, row, c) : 0);
      grad_in(0, 0, row, c) = scale(0, 0, 0, c) * g + slope(0, 0, 0, c) * centred + offset(0, 0, 0, c);
      sums(block, 0, 0, c) += g;
      sums(block, 1, 0, c) += g * centred;
      const double count = static_cast<double>(std::min(NormSizes::block_rows, p.rows - first));
      moments(block, 0, 0, c) += x / count;
      if (row + 1 == p.rows || (row + 1) % NormSizes::block_rows == 0)
        for (int64_t i = first; i <= row; ++i)
          moments(block, 1, 0, c) += std::pow(in(0, 0, i, c) - moments(block, 0, 0, c), 2);
    }
  const std::string what = title("norm", type, {p.rows, p.channels});
  const Rows input{in.data(), in.stride[2]}, grad_output{grad.data(), grad.stride[2]};
  const Rows added = has_residual ? Rows{residual.data(), residual.stride[2]} : Rows{};
  const NormBackward backward{p, activation, input, grad_output, scale.data(), shift.data(), mean.data()};
  run(what, kernels.norm_statistics, {p, input, moments.data()}, {&moments});
  moments.check(what + ", moments");
  run(what, kernels.norm_forward, {p, activation, input, scale.data(), shift.data(), added, out.data()}, {&out});
  out.check(what);
  run(what, kernels.norm_backward_sums, {backward, sums.data()}, {&sums});
  sums.check(what + ", sums of gradients");
  run(what, kernels.norm_backward_input, {backward, slope.data(), offset.data(), grad_in.data()}, {&grad_in});
  grad_in.check(what + ", gradient of the input");
}

/// Every value of a 16-bit type to float32, and any float32 to the type, bit for bit.
void test_conversions(DType type, Random& random) {
  const Format format(type);
  constexpr int64_t count = 1 << 16;
  const std::array<int64_t, 4> size = {1, 1, 1, count};
  Array all(type, size), wide(DType::float32, {1, 2, 1, count}), ones(DType::float32, size), zeros(type, size);
  Array any(DType::float32, size), narrow(type, size);
  for (int64_t i = 0; i < count; ++i) {
    const double x = format.decode(static_cast<uint16_t>(i));
    all(0, 0, 0, i) = wide(0, 0, 0, i) = std::isfinite(x) ? x : 0;
    // half of them near a value of the type or between two, the others with any bits
    const uint32_t bits =
        i % 2 ? random.engine() : (random.engine() & 0xfffff000) + static_cast<uint32_t>(i / 2 % 3) - 1;
    float value;
    std::memcpy(&value, &bits, 4);
    any(0, 0, 0, i) = i % 4 < 2 ? value : std::ldexp(value, random.between(-30, 0)) * 0x1p-100;
    ones(0, 0, 0, i) = 1;
  }
  for (Array* array : {&all, &ones, &zeros, &any})
    array->write_values();
  const NormSizes p{type, 1, count};
  run("widening", kernels.norm_statistics, {p, {all.data(), count}, wide.data()}, {&wide});
  wide.check(title("widening", type, {}), 0);
  run("narrowing", kernels.norm_forward,
      {p, Activation::none, {zeros.data(), count}, ones.data(), any.data(), {}, narrow.data()}, {&narrow});
  for (int64_t i = 0; i < count; ++i) {
    uint16_t found;
    std::memcpy(&found, static_cast<std::byte*>(narrow.data()) + 2 * i, 2);
    const uint16_t expected = format.encode(any(0, 0, 0, i) + 0.0);  // 0 * 1 + -0 is 0
    const bool both_nan = std::isnan(format.decode(found)) && std::isnan(any(0, 0, 0, i));
    if (found != expected && !both_nan)
      fail("narrowing to %s: %a is %04x, expected %04x\n", name_of(type), any(0, 0, 0, i), found, expected);
  }
}

// Products ----------------------------------------------------------------------------------------------------------

void test_product(DType type, bool quantized, Random& random) {
  PackedConvForward p{};
  const bool pointwise = random.coin();
  p.dtype = type;
  p.batch = random.between(1, 2);
  p.in_channels = random.between(1, pointwise ? 700 : 40);
  p.height = random.between(1, 13), p.width = random.between(1, 13);
  p.out_channels = random.between(1, 110);
  p.kernel = pointwise ? 1 : 2 * random.between(0, 2) + 1;
  p.stride = random.between(0, 2) ? 1 : 2;
  p.activation = random.coin() ? Activation::relu : Activation::none;
  p.residual_inside = random.coin();
  p.quantized = quantized;
  const int64_t gap = random.between(0, 1) * random.between(1, 5), N = p.out_channels, patch = p.patch();
  const Array in(type, {p.batch, p.height, p.width, p.in_channels}, gap, random);
  Array out(type, {1, 1, p.rows(), N}, gap);
  const Array residual(type, out.size, gap, random), second(type, out.size, 0, random);
  const Array bias(DType::float32, {1, 1, 1, N}, 0, random);
  p.input = in.image(), p.output = out.data(), p.output_row = out.stride[2];
  if (random.coin()) p.bias = bias.data();
  if (random.coin()) p.residual = residual.data(), p.residual_row = residual.stride[2];
  if (random.coin()) p.second_residual = second.data(), p.second_residual_row = second.stride[2];

  // The weight: values[n][k] for the reference, and packed.
  const float scale = 2.5f / 255, inverse = 1 / scale, zero_point = 90;
  std::vector<double> values(N * patch), multiplier(N);
  const int64_t adjacent = quantized ? PackedConvForward::group : 2, steps = quantized ? p.groups() : p.pairs();
  const int64_t bytes = quantized ? 1 : bytes_of(type), facts = quantized ? PackedConvForward::quantized_facts : 0;
  std::vector<std::byte> packed(p.panels() * (steps + facts) * PackedConvForward::panel * adjacent * bytes);
  for (int64_t n = 0; n < N; ++n) {
    std::byte* const from = packed.data() + n / 32 * (steps + facts) * 32 * adjacent * bytes;
    int32_t sum = 0;
    for (int64_t k = 0; k < patch; ++k) {
      double& value = values[n * patch + k];
      std::byte* const to = from + ((k / adjacent * 32 + n % 32) * adjacent + k % adjacent) * bytes;
      if (quantized) {
        value = static_cast<double>(random.between(-127, 127));
        *to = static_cast<std::byte>(static_cast<int8_t>(value));
        sum += static_cast<int32_t>(value);
      } else {
        write_element(type, to, random.uniform(-1, 1));
        value = read_element(type, to);
      }
    }
    if (!quantized) continue;
    const float factor = static_cast<float>(random.uniform(0.5, 1)) / 127 * scale;
    const int32_t correction = static_cast<int32_t>(zero_point) * sum;
    multiplier[n] = factor;
    std::byte* const fact = from + steps * 128 + n % 32 * 4;
    std::memcpy(fact, &factor, 4), std::memcpy(fact + 128, &correction, 4);
    if (n % 32 == 0) std::memcpy(fact + 256, &inverse, 4), std::memcpy(fact + 260, &zero_point, 4);
  }
  p.weight = packed.data();

  // In 8 bits: the integers that the input is rounded to, without the zero point, and float32 from the sums on.
  const auto rounded = [&](double x) {
    const float scaled = static_cast<float>(x) * inverse;
    return quantized ? std::clamp(std::nearbyint(scaled + static_cast<double>(zero_point)), 0.0, 255.0) - zero_point
                     : x;
  };
  std::vector<double> sums(p.rows() * N);
  for (int64_t b = 0; b < p.batch; ++b)
    for_taps(p, [&](int64_t y, int64_t x, int64_t in_y, int64_t in_x, int64_t tap) {
      const int64_t row = (b * p.out_height() + y) * p.out_width() + x;
      for (int64_t c = 0; c < p.in_channels; ++c) {
        const double input = rounded(in(b, in_y, in_x, c));
        for (int64_t n = 0; n < N; ++n)
          sums[row * N + n] += input * values[n * patch + tap * p.in_channels + c];
      }
    });
  for (int64_t row = 0; row < p.rows(); ++row)
    for (int64_t n = 0; n < N; ++n) {
      const auto kept = [&](double value) {
        return quantized ? static_cast<double>(static_cast<float>(value)) : value;
      };
      double value = sums[row * N + n];
      if (quantized) value = kept(value * multiplier[n]);
      if (p.bias) value = kept(value + bias(0, 0, 0, n));
      if (p.residual && p.residual_inside) value = kept(value + residual(0, 0, row, n));
      value = activated(p.activation, value);
      if (p.residual && !p.residual_inside) value = kept(value + residual(0, 0, row, n));
      if (p.second_residual) value = kept(value + second(0, 0, row, n));
      out(0, 0, row, n) = bytes_of(type) > 2 || !quantized ? value : Format(type).decode(Format(type).encode(value));
    }
  const std::string what = title(quantized ? "product in 8 bits" : "product", type,
                                 {p.batch, p.in_channels, p.height, p.width, N, p.kernel, p.stride});
  const auto& kernel = quantized                 ? kernels.packed_conv_int8
                       : type == DType::bfloat16 ? kernels.packed_conv_bfloat16
                                                 : kernels.packed_conv;
  run(what, kernel, p, {&out});
  quantized ? out.check(what, 0) : out.check(what);  // all instruction sets have the same bits in 8 bits
}

void test_weight_gradient(Random& random) {
  const DType type = DType::float32;
  const int64_t rows = random.between(1, 600), outputs = random.between(1, 70), inputs = random.between(1, 110);
  const Array grad(type, {1, 1, rows, outputs}, random.between(0, 5), random);
  const Array in(type, {1, 1, rows, inputs}, random.between(0, 5), random);
  Array out(type, {1, 1, outputs, inputs});
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t i = 0; i < inputs; ++i)
        out(0, 0, o, i) += grad(0, 0, row, o) * in(0, 0, row, i);
  const std::string what = title("gradient of a weight", type, {rows, outputs, inputs});
  const auto of_rows = [&](int64_t first, int64_t last, bool add) {
    const auto from = [&](const Array& x) -> Rows {
      return {static_cast<const float*>(x.data()) + first * x.stride[2], x.stride[2]};
    };
    return WeightGradient{last - first, outputs, inputs, from(grad), from(in), static_cast<float*>(out.data()), add};
  };
  run(what, kernels.weight_gradient, of_rows(0, rows, false), {&out});
  out.check(what);
  const int64_t half = random.between(0, rows);
  out.clear();
  for (const WeightGradient& p : {of_rows(0, half, false), of_rows(half, rows, true)}) {
    std::vector<std::byte> scratch(kernels.weight_gradient.scratch_bytes(p) + 64);
    const auto begin = (reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64;
    kernels.weight_gradient.run(p, 0, kernels.weight_gradient.tasks(p), reinterpret_cast<std::byte*>(begin));
  }
  out.check(what + " in two parts");
}

}  // namespace

int main(int count, char** arguments) {
  const int trials = count > 1 ? std::atoi(arguments[1]) : 10;
  report_bad_access();
  for (int trial = 0; trial < trials; ++trial)
    for (const DType type : {DType::float32, DType::float64, DType::float16, DType::bfloat16}) {
      Random random(4 * trial + static_cast<unsigned>(type));
      test_scan(type, random);
      test_haar(type, random);
      test_depthwise(type, random);
      test_gate(type, random);
      test_norm(type, random);
      if (bytes_of(type) == 2 && trial == 0) test_conversions(type, random);
      if (type == DType::float64) continue;  // torch multiplies it
      if (type == DType::float32) test_weight_gradient(random);
      test_product(type, false, random);
      test_product(type, true, random);
    }
  std::printf("%s: %d trials, %d failures\n", std::string(cpu::kernels().name).c_str(), trials, failures);
  return failures > 0 || trials < 1;
}
