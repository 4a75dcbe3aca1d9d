// The convolution on a packed weight in bfloat16 and on a quantized weight, for AMX: each instruction multiplies 16
// rows by 32 inputs in bfloat16, or 64 in 8 bits, by 16 outputs.
#ifdef __x86_64__
// System headers come before the target pragma: the linker may keep their functions for every machine.
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#define MOBILEMAMBA_CPU_ISA amx
#define MOBILEMAMBA_CPU_VECTOR_BYTES 64
#define MOBILEMAMBA_CPU_ROUNDS_TO_BFLOAT16
#include "cpu/kernels.h"

namespace mobilemamba::cpu::amx {

bool available() {
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25,
                     all = amx_bf16 | amx_tile | amx_int8;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#ifdef __linux__
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM: tiles are 8 KiB of state
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace mobilemamba::cpu::amx

#ifdef __clang__
#pragma clang attribute push(                                                                                     \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8,avx2,fma")
#endif

#include "cpu/quantized_conv_kernels.h"

namespace mobilemamba::cpu::amx {
namespace {

/// The shapes of the eight tiles, in the layout of the instruction that sets them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

/// Sums of one panel, which has `whole` inputs in whole steps, and after them the padded step `rest`, where that is not
/// null. A step is that of `Kernel`, whose add() multiplies one. `ahead`, where it is not null, is prefetched.
template <typename Kernel, int row_tiles, typename Input, typename Weight>
void multiply(const Input* input, int64_t row, const Weight* weight, const Weight* ahead, int64_t whole,
              const Weight* rest, float (*sums)[PackedConvForward::panel]) {
  constexpr int64_t panel = PackedConvForward::panel, step = Kernel::step, cache_line = 64 / sizeof(Weight);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (row_tiles == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < whole; k += step) {
    if (ahead)
      for (int64_t i = 0; i < step * panel; i += cache_line)
        __builtin_prefetch(ahead + k * panel + i);
    Kernel::template add<row_tiles>(input + k, row, weight + k * panel);
  }
  if (rest) Kernel::template add<row_tiles>(input + whole, row, rest);
  constexpr int64_t line = panel * sizeof(float);
  _tile_stored(0, sums[0], line);
  _tile_stored(1, sums[0] + 16, line);
  if constexpr (row_tiles == 2) {
    _tile_stored(2, sums[16], line);
    _tile_stored(3, sums[16] + 16, line);
  }
}

/// 32 rows by 32 outputs: tiles 0 to 3 hold the sums, 4 and 5 the inputs of 16 rows each, 6 and 7 the weights of 16
/// outputs each. The instruction takes weights in pairs of inputs, which is the layout of a panel.
struct TileKernel {
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int64_t step = 32;  // inputs
  using Task = PackedConvTask<16>;
  using TilePatches = Patches<BFloat16, step, true>;

  struct Scratch {
    float sums[32][panel];
    BFloat16 weight[step * panel];  // the panel's last inputs, padded to a whole step
  };

  static size_t scratch_bytes(const PackedConvForward& p) { return sizeof(Scratch) + TilePatches::scratch_bytes(p); }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* memory) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
    TilePatches patches;
    TileShapes shapes;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      patches.set(p, task.first, task.last, memory + sizeof(Scratch));
      const BFloat16* weight = static_cast<const BFloat16*>(p.weight) + task.channel * 2 * p.pairs();
      const int64_t whole = p.patch() / step * step, rest = (2 * p.pairs() - whole) * panel;
      __builtin_memcpy(scratch.weight, weight + whole * panel, rest * sizeof(BFloat16));
      __builtin_memset(scratch.weight + rest, 0, (step * panel - rest) * sizeof(BFloat16));
      const BFloat16* last_step = rest > 0 ? scratch.weight : nullptr;

      for (int64_t row = task.first; row < task.last; row += 32) {
        const int rows = static_cast<int>(min(32, task.last - row));
        shape(shapes, rows);
        for (int r = 0; r < rows; ++r)
          prefetch_row<BFloat16>(p, row + r, task.channel);
        // the first pass over the panel prefetches the next panel
        const BFloat16* ahead = row == task.first ? weight + 2 * p.pairs() * panel : nullptr;
        const BFloat16* input = patches.data + (row - task.first) * patches.row;
        if (rows > 16)
          multiply<TileKernel, 2>(input, patches.row, weight, ahead, whole, last_step, scratch.sums);
        else
          multiply<TileKernel, 1>(input, patches.row, weight, ahead, whole, last_step, scratch.sums);
        finish_rows<BFloat16>(p, scratch.sums, row, rows, task.channel, task.channels(p));
      }
    }
    _tile_release();
  }

  /// Sets the tiles' number of rows, if it changed.
  static void shape(TileShapes& shapes, int rows) {
    const uint8_t first = min(rows, 16), second = max(rows - 16, 1);
    if (shapes.rows[0] == first && shapes.rows[2] == second) return;
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = first;
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = second;
    shapes.rows[6] = shapes.rows[7] = step / 2;
    _tile_loadconfig(&shapes);
  }

  template <int row_tiles>
  MOBILEMAMBA_HOST_DEVICE static void add(const BFloat16* input, int64_t row, const BFloat16* weight) {
    constexpr int64_t line = 2 * panel * sizeof(BFloat16);
    _tile_loadd(6, weight, line);
    _tile_loadd(7, weight + panel, line);
    _tile_loadd(4, input, row * sizeof(BFloat16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (row_tiles == 2) {
      _tile_loadd(5, input + 16 * row, row * sizeof(BFloat16));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
};

/// The same tiles, with 64 inputs a step in groups of four.
struct ByteTileKernel {
  static constexpr int64_t panel = PackedConvForward::panel;
  static constexpr int64_t step = 64;  // inputs
  using Task = PackedConvTask<16>;
  using Patches = QuantizedPatches<step>;
  using Sums = QuantizedSums<32>;

  struct Scratch {
    Sums sums;
    int8_t weight[step * panel];  // the panel's last inputs, padded to a whole step
  };

  static size_t scratch_bytes(const PackedConvForward& p) { return sizeof(Scratch) + Patches::scratch_bytes(p); }

  static void run(const PackedConvForward& p, int64_t begin, int64_t end, std::byte* memory) {
    Scratch& scratch = *reinterpret_cast<Scratch*>(memory);
    Patches patches;
    TileShapes shapes;
    const int64_t whole = p.patch() / step * step, rest = (4 * p.groups() - whole) * panel;
    for (int64_t index = begin; index < end; ++index) {
      const Task task(p, index);
      const QuantizedPanel from(p, task.channel);
      patches.set(p, task.first, task.last, memory + sizeof(Scratch));
      if (rest > 0) {
        __builtin_memcpy(scratch.weight, from.weight + whole * panel, rest);
        __builtin_memset(scratch.weight + rest, 0, step * panel - rest);
      }
      const int8_t* last_step = rest > 0 ? scratch.weight : nullptr;
      for (int64_t row = task.first; row < task.last; row += 32) {
        const int rows = static_cast<int>(min(32, task.last - row));
        TileKernel::shape(shapes, rows);
        for (int r = 0; r < rows; ++r)
          prefetch_quantized_row(p, row + r, task.channel);
        // the first pass over the panel prefetches the next panel
        const int8_t* ahead = row == task.first ? from.end() : nullptr;
        const uint8_t* input = patches.data + (row - task.first) * patches.row;
        if (rows > 16)
          multiply<ByteTileKernel, 2>(input, patches.row, from.weight, ahead, whole, last_step, scratch.sums.values);
        else
          multiply<ByteTileKernel, 1>(input, patches.row, from.weight, ahead, whole, last_step, scratch.sums.values);
        finish_quantized(p, from, scratch.sums, row, rows, task.channel, task.channels(p));
      }
    }
    _tile_release();
  }

  template <int row_tiles>
  MOBILEMAMBA_HOST_DEVICE static void add(const uint8_t* input, int64_t row, const int8_t* weight) {
    _tile_loadd(6, weight, QuantizedPanel::row);
    _tile_loadd(7, weight + QuantizedPanel::row / 2, QuantizedPanel::row);
    _tile_loadd(4, input, row);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if constexpr (row_tiles == 2) {
      _tile_loadd(5, input + 16 * row, row);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  }
};

}  // namespace

constinit const Kernel<PackedConvForward> packed_conv_int8 = quantized_conv<ByteTileKernel>;

constinit const Kernel<PackedConvForward> packed_conv_bfloat16 = {TileKernel::Task::count, TileKernel::scratch_bytes,
                                                                  TileKernel::run};

}  // namespace mobilemamba::cpu::amx

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
