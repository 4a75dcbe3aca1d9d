// Chooses the CPU kernels for this machine, once.
#include "cpu/kernels.h"

#include <cstdlib>
#include <string_view>

#include "mobilemamba.h"

namespace mobilemamba::cpu {
namespace {

Kernels choose() {
#ifdef __x86_64__
  const char* setting = std::getenv("ATEN_CPU_CAPABILITY");  // torch's own kernels obey it too
  const std::string_view limit = setting ? setting : "";
  if (limit == "default") return generic::kernels;
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit != "avx2") {
    Kernels chosen = avx512::kernels;
    if (limit == "avx512") return chosen;
    if (__builtin_cpu_supports("avx512bf16")) chosen.packed_conv_bfloat16 = avx512bf16::packed_conv_bfloat16;
    if (limit != "avx512_bf16" && amx::available()) chosen.packed_conv_bfloat16 = amx::packed_conv_bfloat16;
    return chosen;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#endif
  return generic::kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace mobilemamba::cpu

std::string_view mobilemamba::cpu_kernels() {
  return cpu::kernels().name;
}
