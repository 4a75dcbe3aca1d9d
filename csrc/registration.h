// Registers the operators once in a process, also where two copies of the library are loaded: the Python package's _C
// and libmobilemamba.so.
#pragma once

#include <torch/library.h>

namespace mobilemamba {

/// Whether this copy is the first in the process. A later copy registers nothing and works through the operators of
/// the first: torch aborts the process when a schema is defined twice.
bool first_copy();

}  // namespace mobilemamba

/// TORCH_LIBRARY_FRAGMENT for mobilemamba's schemas, in the first copy only.
#define MOBILEMAMBA_LIBRARY(m) MOBILEMAMBA_FIRST_COPY_ONLY(TORCH_LIBRARY_FRAGMENT(mobilemamba, library), m, C10_UID)

/// TORCH_LIBRARY_IMPL for mobilemamba's kernels of dispatch key `k`, in the first copy only.
#define MOBILEMAMBA_LIBRARY_IMPL(k, m) \
  MOBILEMAMBA_FIRST_COPY_ONLY(TORCH_LIBRARY_IMPL(mobilemamba, k, library), m, C10_UID)

#define MOBILEMAMBA_FIRST_COPY_ONLY(torch_macro, m, uid)                                 \
  static void C10_CONCATENATE(mobilemamba_register_, uid)(torch::Library & m);           \
  torch_macro {                                                                          \
    if (mobilemamba::first_copy()) C10_CONCATENATE(mobilemamba_register_, uid)(library); \
  }                                                                                      \
  static void C10_CONCATENATE(mobilemamba_register_, uid)(torch::Library & m)
