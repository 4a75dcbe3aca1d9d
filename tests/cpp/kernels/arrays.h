// Arrays for test_kernels.cpp: elements of every type with gaps between them, and the comparison with a reference.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/kernels.h"

using mobilemamba::DType;

inline int failures = 0;

template <typename... Values>
void fail(const char* format, Values... values) {
  if (++failures <= 20) std::printf(format, values...);  // more would hide the first
}

/// The kernel that runs, for an access out of bounds.
inline char running[128];

inline void report_bad_access() {
  signal(SIGSEGV, [](int) {
    constexpr char text[] = ": access out of bounds\n";
    if (write(STDOUT_FILENO, running, std::strlen(running)) >= 0) (void)!write(STDOUT_FILENO, text, sizeof text - 1);
    _exit(1);
  });
}

inline int64_t bytes_of(DType type) {
  return type == DType::float64 ? 8 : type == DType::float32 ? 4 : 2;
}

inline DType accumulator(DType type) {
  return type == DType::float64 ? DType::float64 : DType::float32;
}

inline const char* name_of(DType type) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[static_cast<int>(type)];
}

/// A type of 16 bits: bits of its mantissa, and the exponent of its least normal value.
struct Format {
  int mantissa, least;

  explicit Format(DType type) : mantissa(type == DType::float16 ? 10 : 7), least(type == DType::float16 ? -14 : -126) {}

  uint32_t infinity() const { return static_cast<uint32_t>(3 - 2 * least) << mantissa; }

  /// Rounds to nearest even.
  uint16_t encode(double x) const {
    const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return static_cast<uint16_t>(sign | infinity() | 1);
    if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity());
    const double magnitude = std::abs(x);
    const int exponent = magnitude > 0 ? std::max(least, std::ilogb(magnitude)) : least;
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, mantissa - exponent)));
    const uint32_t bits = (static_cast<uint32_t>(exponent - least) << mantissa) + steps;
    return static_cast<uint16_t>(sign | std::min(bits, infinity()));
  }

  double decode(uint16_t bits) const {
    const uint32_t magnitude = bits & 0x7fff, field = magnitude >> mantissa, one = 1u << mantissa;
    const double sign = bits & 0x8000 ? -1 : 1;
    if (magnitude >= infinity()) return magnitude > infinity() ? NAN : sign * INFINITY;
    const uint32_t steps = field ? (magnitude & (one - 1)) + one : magnitude;
    return sign * std::ldexp(steps, static_cast<int>(std::max(field, 1u)) - 1 + least - mantissa);
  }
};

inline void write_element(DType type, std::byte* to, double x) {
  if (type == DType::float64) {
    std::memcpy(to, &x, 8);
  } else if (type == DType::float32) {
    const float value = static_cast<float>(x);
    std::memcpy(to, &value, 4);
  } else {
    const uint16_t bits = Format(type).encode(x);
    std::memcpy(to, &bits, 2);
  }
}

inline double read_element(DType type, const std::byte* from) {
  double x;
  float value;
  uint16_t bits;
  if (type == DType::float64) return std::memcpy(&x, from, 8), x;
  if (type == DType::float32) return std::memcpy(&value, from, 4), value;
  return std::memcpy(&bits, from, 2), Format(type).decode(bits);
}

struct Random {
  std::mt19937 engine;

  explicit Random(unsigned seed) : engine(seed) {}
  int64_t between(int64_t least, int64_t most) {
    return least + static_cast<int64_t>(engine() % static_cast<uint64_t>(most - least + 1));
  }
  bool coin() { return engine() % 2; }
  double uniform(double least, double most) { return least + (most - least) * (engine() / 4294967296.0); }
};

/// Bytes up to the end of a page. The page after them cannot be accessed, so that reading beyond the end is an error
/// too.
class Pages {
 public:
  explicit Pages(size_t size) : size_(size), whole_((size + page - 1) / page * page) {
    begin_ = mmap(nullptr, whole_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin_ == MAP_FAILED || mprotect(end(), page, PROT_NONE) != 0) std::abort();
  }
  ~Pages() { munmap(begin_, whole_ + page); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  std::byte* begin() { return end() - size_; }
  std::byte* end() { return static_cast<std::byte*>(begin_) + whole_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t page = 1 << 16;  // the largest of aarch64
  size_t size_, whole_;
  void* begin_;
};

/// Elements (n0, n1, n2, n3), the last contiguous. What lies between and before them is NaN, byte 0xff: a kernel must
/// neither use nor change it. The values are what an input holds, and what an output is expected to hold.
class Array {
 public:
  std::array<int64_t, 4> size;
  std::array<int64_t, 3> stride;  // elements

  Array(DType type, std::array<int64_t, 4> size, int64_t gap = 0)
      : size(size), type_(type), values_(size[0] * size[1] * size[2] * size[3]) {
    stride[2] = size[3] + gap;
    stride[1] = size[2] * stride[2] + 2 * gap;
    stride[0] = size[1] * stride[1] + 3 * gap;
    const int64_t last = (size[0] - 1) * stride[0] + (size[1] - 1) * stride[1] + (size[2] - 1) * stride[2] + size[3];
    pages_ = std::make_unique<Pages>(margin + std::max<int64_t>(0, last) * bytes_of(type));
    clear();
  }

  /// A random input.
  Array(DType type, std::array<int64_t, 4> size, int64_t gap, Random& random, double least = -1, double most = 1)
      : Array(type, size, gap) {
    for (double& value : values_)
      value = random.uniform(least, most);
    write_values();
  }

  double& operator()(int64_t i, int64_t j, int64_t k, int64_t l) {
    return values_[((i * size[1] + j) * size[2] + k) * size[3] + l];
  }
  double operator()(int64_t i, int64_t j, int64_t k, int64_t l) const { return const_cast<Array&>(*this)(i, j, k, l); }

  /// Writes the values to memory, and replaces them by what the type holds.
  void write_values() {
    each([&](double& value, int64_t offset) {
      write_element(type_, pages_->begin() + offset, value);
      value = read_element(type_, pages_->begin() + offset);
    });
  }

  void* data() { return pages_->begin() + margin; }
  const void* data() const { return pages_->begin() + margin; }
  std::vector<std::byte> bytes() const { return {pages_->begin(), pages_->end()}; }
  void clear() { std::fill(pages_->begin(), pages_->end(), std::byte{0xff}); }

  mobilemamba::Image image() const { return {data(), stride[0], stride[1], stride[2]}; }

  /// Compares memory with the values. An element's error is at most `tolerance` times the sum of its magnitude and the
  /// quadratic mean of all.
  void check(const std::string& what, double tolerance) {
    double squares = 0;
    for (const double value : values_)
      squares += value * value;
    const double mean = values_.empty() ? 0 : std::sqrt(squares / static_cast<double>(values_.size()));
    std::vector<bool> element(pages_->size());
    each([&](double& expected, int64_t offset) {
      const double found = read_element(type_, pages_->begin() + offset);
      const double error = std::abs(found - expected);
      if (found != expected && !(error <= tolerance * (std::abs(expected) + mean)))
        fail("%s: element %ld is %.9g, expected %.9g\n", what.c_str(), static_cast<long>(&expected - values_.data()),
             found, expected);
      std::fill_n(element.begin() + offset, bytes_of(type_), true);
    });
    for (size_t i = 0; i < pages_->size(); ++i)
      if (!element[i] && pages_->begin()[i] != std::byte{0xff})
        return fail("%s: wrote to byte %ld, which is of no element\n", what.c_str(), static_cast<long>(i) - margin);
  }
  void check(const std::string& what) {
    constexpr double tolerances[] = {2e-5, 1e-12, 1e-3, 8e-3};  // in the order of DType
    check(what, tolerances[static_cast<int>(type_)]);
  }

 private:
  static constexpr int64_t margin = 128;  // bytes before the first element: two of the widest vectors

  /// Calls f(value, offset in bytes) for each element.
  template <typename F>
  void each(F f) {
    double* value = values_.data();
    for (int64_t i = 0; i < size[0]; ++i)
      for (int64_t j = 0; j < size[1]; ++j)
        for (int64_t k = 0; k < size[2]; ++k)
          for (int64_t l = 0; l < size[3]; ++l)
            f(*value++, margin + (i * stride[0] + j * stride[1] + k * stride[2] + l) * bytes_of(type_));
  }

  DType type_;
  std::vector<double> values_;
  std::unique_ptr<Pages> pages_;
};

/// Scratch memory of a thread. Its contents are NaN, and what lies after it must not change.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(bytes), lines_(bytes / sizeof(Line) + 2) {
    std::memset(data(), 0xff, lines_.size() * sizeof(Line));
  }
  std::byte* data() { return lines_[0].bytes; }
  bool kept_its_end() {
    return std::all_of(data() + bytes_, data() + lines_.size() * sizeof(Line),
                       [](std::byte b) { return b == std::byte{0xff}; });
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  size_t bytes_;
  std::vector<Line> lines_;
};

/// Runs a kernel twice: all tasks in one call, and one by one, from the last to the first, by three threads. Both must
/// give the same bits.
template <typename Params>
void run(const std::string& what, const mobilemamba::cpu::Kernel<Params>& kernel, const Params& params,
         std::initializer_list<Array*> outputs) {
  std::snprintf(running, sizeof running, "%s", what.c_str());
  const int64_t tasks = kernel.tasks(params);
  const size_t bytes = kernel.scratch_bytes(params);
  bool scratch_kept = true;
  std::vector<std::vector<std::byte>> first;
  {
    Scratch scratch(bytes);
    kernel.run(params, 0, tasks, scratch.data());
    scratch_kept = scratch.kept_its_end();
  }
  for (Array* output : outputs) {
    first.push_back(output->bytes());
    output->clear();
  }
#pragma omp parallel num_threads(3) reduction(&& : scratch_kept)
  {
    Scratch scratch(bytes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i)
      kernel.run(params, tasks - 1 - i, tasks - i, scratch.data());
    scratch_kept = scratch_kept && scratch.kept_its_end();
  }
  if (!scratch_kept) fail("%s: wrote after its scratch memory\n", what.c_str());
  size_t i = 0;
  for (const Array* output : outputs)
    if (output->bytes() != first[i++]) fail("%s: three threads give other bits than one call\n", what.c_str());
}
