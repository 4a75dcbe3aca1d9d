// The convolution on a packed weight in bfloat16, for AMX: each instruction multiplies 16 rows by 32 inputs by 16
// outputs.
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
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
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
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,avx2,fma")
#endif

#include "cpu/packed_conv_kernels.h"

namespace mobilemamba::cpu::amx {
namespace {

/// The shapes of the eight tiles, in the layout of the instruction that sets them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

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

      for (int64_t row = task.first; row < task.last; row += 32) {
        const int rows = static_cast<int>(min(32, task.last - row));
        shape(shapes, rows);
        for (int r = 0; r < rows; ++r)
          prefetch_row<BFloat16>(p, row + r, task.channel);
        // the first pass over the panel prefetches the next panel
        const BFloat16* ahead = row == task.first ? weight + 2 * p.pairs() * panel : nullptr;
        const BFloat16* input = patches.data + (row - task.first) * patches.row;
        if (rows > 16)
          multiply<2>(input, patches.row, weight, ahead, whole, scratch, rest > 0);
        else
          multiply<1>(input, patches.row, weight, ahead, whole, scratch, rest > 0);
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
  static void multiply(const BFloat16* input, int64_t row, const BFloat16* weight, const BFloat16* ahead, int64_t whole,
                       Scratch& scratch, bool rest) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (row_tiles == 2) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < whole; k += step) {
      if (ahead)
        for (int64_t i = 0; i < step * panel; i += 32)
          __builtin_prefetch(ahead + k * panel + i);
      add<row_tiles>(input + k, row, weight + k * panel);
    }
    if (rest) add<row_tiles>(input + whole, row, scratch.weight);
    constexpr int64_t line = panel * sizeof(float);
    _tile_stored(0, scratch.sums[0], line);
    _tile_stored(1, scratch.sums[0] + 16, line);
    if constexpr (row_tiles == 2) {
      _tile_stored(2, scratch.sums[16], line);
      _tile_stored(3, scratch.sums[16] + 16, line);
    }
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

}  // namespace

constinit const Kernel<PackedConvForward> packed_conv_bfloat16 = {TileKernel::Task::count, TileKernel::scratch_bytes,
                                                                  TileKernel::run};

}  // namespace mobilemamba::cpu::amx

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
