// Patches of an image, for the kernels of the convolution on a packed weight.
#pragma once

#include "cpu/vec.h"
#include "kernels/packed_conv.h"

namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA {

/// The most rows of a task. Each row has one patch.
constexpr int64_t packed_conv_task_rows = 192;

/// Copies in pieces of constant size, because patches are short: a call of memcpy for each patch made the patch
/// embedding 1.3 times slower (benchmarks/NOTES.md). The last piece may overlap the piece before it.
template <int64_t piece>
MOBILEMAMBA_HOST_DEVICE void copy_pieces(const char* from, char* to, int64_t bytes) {
  if (bytes >= piece) {
    for (int64_t i = 0; i + piece <= bytes; i += piece)
      __builtin_memcpy(to + i, from + i, piece);
    __builtin_memcpy(to + bytes - piece, from + bytes - piece, piece);
  } else if constexpr (piece > 2) {
    copy_pieces<piece / 2>(from, to, bytes);
  }
}

/// Copies elements and converts them to another type.
template <typename From, typename To>
MOBILEMAMBA_HOST_DEVICE void copy_elements(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + Vec<float>::size <= count; i += Vec<float>::size)
    store(to + i, load(from + i, Vec<float>::size), Vec<float>::size);
  if (i < count) {
    const int left = static_cast<int>(count - i);
    store(to + i, load(from + i, left), left);
  }
}
template <typename T>
MOBILEMAMBA_HOST_DEVICE void copy_elements(const T* from, T* to, int64_t count) {
  copy_pieces<64>(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(to), count * sizeof(T));
}

template <typename T>
MOBILEMAMBA_HOST_DEVICE void clear(T* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, count * sizeof(T));
}

/// Output columns [begin, end): their patches cross neither the left nor the right border, and the columns of the image
/// are adjacent in memory. So each line of such a patch is one piece of memory.
struct InnerColumns {
  int64_t begin, end;

  explicit InnerColumns(const PackedConvForward& p) {
    const int64_t pad = p.kernel / 2;
    begin = p.input.column == p.in_channels ? ceil_div(pad, p.stride) : p.out_width();
    end = max(begin, (p.width - p.kernel + pad) / p.stride + 1);
  }

  bool contain(int64_t x) const { return x >= begin && x < end; }
};

/// How elements come into a patch: as they are, or converted to another type. Padding is zero.
struct CopyElements {
  template <typename From, typename To>
  MOBILEMAMBA_HOST_DEVICE void operator()(const From* from, To* to, int64_t count) const {
    copy_elements(from, to, count);
  }
  template <typename To>
  MOBILEMAMBA_HOST_DEVICE void zeros(To* to, int64_t count) const {
    clear(to, count);
  }
};

/// Copies one line of a patch, which begins at `column` of a line of the image. Columns outside the image are zero.
template <typename From, typename To, typename Copy = CopyElements>
void copy_line(const PackedConvForward& p, int64_t column, const From* image_line, To* to, const Copy& copy = {}) {
  const int64_t channels = p.in_channels, begin = max(0, -column), end = min(p.kernel, p.width - column);
  const From* from = image_line + (column + begin) * p.input.column;
  copy.zeros(to, begin * channels);
  if (p.input.column == channels)
    copy(from, to + begin * channels, (end - begin) * channels);
  else
    for (int64_t kx = begin; kx < end; ++kx, from += p.input.column)
      copy(from, to + kx * channels, channels);
  copy.zeros(to + end * channels, (p.kernel - end) * channels);
}

/// Copies the patches of rows [first, last), each filled up to `whole` elements.
template <typename From, typename To, typename Copy = CopyElements>
void copy_patches(const PackedConvForward& p, int64_t first, int64_t last, To* to, int64_t whole,
                  const Copy& copy = {}) {
  const int64_t width = p.out_width(), pad = p.kernel / 2, line_elements = p.kernel * p.in_channels;
  const int64_t padding = whole - p.patch();
  const InnerColumns inner(p);
  int64_t x = first % width, y = first / width % p.out_height(), batch = first / width / p.out_height();
  for (int64_t i = first; i < last; ++i) {
    const From* image = static_cast<const From*>(p.input.data) + batch * p.input.batch;
    const int64_t column = x * p.stride - pad;
    for (int64_t ky = 0; ky < p.kernel; ++ky, to += line_elements) {
      const int64_t line = y * p.stride - pad + ky;
      if (line < 0 || line >= p.height) {
        copy.zeros(to, line_elements);
        continue;
      }
      const From* from = image + line * p.input.row;
      if (inner.contain(x))
        copy(from + column * p.input.column, to, line_elements);
      else
        copy_line(p, column, from, to, copy);
    }
    copy.zeros(to, padding);
    to += padding;
    if (++x == width) {
      x = 0;
      if (++y == p.out_height()) {
        y = 0;
        ++batch;
      }
    }
  }
}

/// The patches of a task's rows, one after another. A copy is padded with zeros to a multiple of `step` elements. With
/// `always_whole`, all patches are such multiples: a patch of another size is copied even if it could be read in place.
template <typename T, int64_t step, bool always_whole = false>
struct Patches {
  const T* data;
  int64_t row;  // elements from patch to patch
  int64_t gathered = -1;

  static bool in_place(const PackedConvForward& p) { return p.in_place() && (!always_whole || p.patch() % step == 0); }

  static int64_t whole(const PackedConvForward& p) { return ceil_div(p.patch(), step) * step; }

  static size_t scratch_bytes(const PackedConvForward& p) {
    return in_place(p) ? 0 : ceil_div(packed_conv_task_rows * whole(p) * sizeof(T), 64) * 64;
  }

  /// Prepares rows [first, last). Scratch memory must keep the copies of the last call, which are used again.
  void set(const PackedConvForward& p, int64_t first, int64_t last, std::byte* scratch) {
    if (in_place(p)) {
      row = p.input.column;
      data = static_cast<const T*>(p.input.data) + first * row;
      return;
    }
    data = reinterpret_cast<const T*>(scratch);
    row = whole(p);
    if (gathered == first) return;
    gathered = first;
    copy_patches<T>(p, first, last, reinterpret_cast<T*>(scratch), row);
  }
};

/// The patches of a task's rows as pointers to their parts. A part is one line of a patch, or the whole patch if the
/// input is the matrix of patches. Parts are read in place, with these exceptions: a part that crosses the left or
/// right border is copied; all parts are copied if the input has another type or its columns are not adjacent; a part
/// above or below the image is a line of zeros that all such parts share.
template <typename T>
class PatchParts {
 public:
  static int64_t count(const PackedConvForward& p) { return p.in_place() ? 1 : p.kernel; }
  static int64_t inputs(const PackedConvForward& p) { return p.patch() / count(p); }

  static size_t scratch_bytes(const PackedConvForward& p) {
    const size_t copies = sizeof(T) == sizeof(float) && p.in_place()
                              ? 0
                              : (packed_conv_task_rows * p.patch() + inputs(p)) * sizeof(float);
    return (count(p) * packed_conv_task_rows * sizeof(float*) + copies + 63) / 64 * 64;
  }

  /// Prepares rows [first, last). Scratch memory must keep the contents of the last call, which are used again.
  void set(const PackedConvForward& p, int64_t first, int64_t last, std::byte* scratch) {
    if (first == first_) return;
    first_ = first;
    parts_ = reinterpret_cast<const float**>(scratch);
    float* copies = reinterpret_cast<float*>(scratch + count(p) * packed_conv_task_rows * sizeof(float*));
    if (p.in_place())
      set_rows(p, last - first, copies);
    else
      set_lines(p, last - first, copies);
  }

  /// Pointers to one part of the patches of `row` and the rows after it.
  const float* const* of(int64_t row, int64_t part) const {
    return parts_ + part * packed_conv_task_rows + row - first_;
  }

 private:
  void set_rows(const PackedConvForward& p, int64_t rows, float* copies) {
    const T* from = static_cast<const T*>(p.input.data) + first_ * p.input.column;
    for (int64_t r = 0; r < rows; ++r, from += p.input.column) {
      if constexpr (sizeof(T) == sizeof(float)) {
        parts_[r] = from;
      } else {
        copy_elements(from, copies, p.in_channels);
        parts_[r] = copies;
        copies += p.in_channels;
      }
    }
  }

  void set_lines(const PackedConvForward& p, int64_t rows, float* copies) {
    const int64_t width = p.out_width(), pad = p.kernel / 2, length = inputs(p);
    const float* zeros = copies;
    clear(copies, length);
    copies += length;
    const InnerColumns inner(p);
    for (int64_t r = 0; r < rows;) {  // a line of the output, or the task's part of it
      const int64_t line = (first_ + r) / width, begin = (first_ + r) % width, end = min(width, begin + rows - r);
      const T* image = static_cast<const T*>(p.input.data) + line / p.out_height() * p.input.batch;
      for (int64_t part = 0; part < p.kernel; ++part) {
        const float** to = parts_ + part * packed_conv_task_rows + r;
        const int64_t y = line % p.out_height() * p.stride - pad + part;
        if (y < 0 || y >= p.height) {
          for (int64_t x = begin; x < end; ++x)
            *to++ = zeros;
          continue;
        }
        const T* from = image + y * p.input.row;
        for (int64_t x = begin; x < end;) {
          if constexpr (sizeof(T) == sizeof(float))  // these can be read in place
            for (; x < end && inner.contain(x); ++x)
              *to++ = from + (x * p.stride - pad) * p.input.column;
          if (x == end) break;
          copy_line(p, x++ * p.stride - pad, from, copies);
          *to++ = copies;
          copies += length;
        }
      }
      r += end - begin;
    }
  }

  const float** parts_ = nullptr;
  int64_t first_ = -1;
};

}  // namespace mobilemamba::cpu::MOBILEMAMBA_CPU_ISA
