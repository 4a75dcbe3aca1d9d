// What the library says of itself, as operators without tensors: its version, what it was compiled for, and which CPU
// kernels are in use. Where two copies are loaded, the one that registered the operators answers.
#include <torch/version.h>

#include <string>

#include "build.h"
#include "cpu/kernels.h"
#include "mobilemamba.h"
#include "registration.h"

#ifdef MOBILEMAMBA_CUDA
#include <cuda_runtime_api.h>
#endif

#ifdef __clang__
#define MOBILEMAMBA_COMPILER __VERSION__  // "Clang 14.0.6", after the distribution's name
#else
#define MOBILEMAMBA_COMPILER "GCC " __VERSION__
#endif

namespace mobilemamba {
namespace {

/// Without CUDA kernels there is no "cuda" (13.0) and no "archs" (sm_80,sm_90+PTX).
c10::Dict<std::string, std::string> build_facts() {
  c10::Dict<std::string, std::string> facts;
  facts.insert("version", build::version);
  facts.insert("torch", TORCH_VERSION);
  facts.insert("compiler", MOBILEMAMBA_COMPILER);
#ifdef MOBILEMAMBA_CUDA
  facts.insert("cuda", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10));
  facts.insert("archs", build::cuda_archs);
#endif
  return facts;
}

}  // namespace

std::string_view cpu_kernels() {
  return cpu::kernels().name;
}

MOBILEMAMBA_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("version", [] { return std::string(build::version); });
  m.impl("build_facts", &build_facts);
  m.impl("cpu_kernels", [] { return std::string(cpu_kernels()); });
}

}  // namespace mobilemamba
