// Chooses the CPU kernels for this machine, once. Like the kernels it includes nothing of torch.
#include "cpu/kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <string_view>

namespace mobilemamba::cpu {
namespace {

Kernels choose() {
  const char* setting = std::getenv("ATEN_CPU_CAPABILITY");  // torch's own kernels obey it too
  const std::string_view limit = setting ? setting : "";
  if (limit == "default") return generic::kernels;
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && limit != "avx2") {
    Kernels chosen = avx512::kernels;
    if (limit == "avx512") return chosen;
    if (__builtin_cpu_supports("avx512vnni")) chosen.packed_conv_int8 = avx512vnni::packed_conv_int8;
    if (__builtin_cpu_supports("avx512bf16")) chosen.packed_conv_bfloat16 = avx512bf16::packed_conv_bfloat16;
    if (limit != "avx512_bf16" && amx::available()) {
      chosen.packed_conv_bfloat16 = amx::packed_conv_bfloat16;
      chosen.packed_conv_int8 = amx::packed_conv_int8;
    }
    return chosen;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kernels;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long dot_products = 1ul << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & dot_products) {
    Kernels chosen = generic::kernels;
    chosen.packed_conv_int8 = dotprod::packed_conv_int8;
    return chosen;
  }
#endif
  return generic::kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace mobilemamba::cpu
