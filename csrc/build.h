// What the build defines for the sources: the version, and the CUDA archs where there are CUDA kernels.
#pragma once

#define MOBILEMAMBA_STRING_(...) #__VA_ARGS__
#define MOBILEMAMBA_STRING(...) MOBILEMAMBA_STRING_(__VA_ARGS__)

namespace mobilemamba::build {

inline constexpr const char* version = MOBILEMAMBA_STRING(MOBILEMAMBA_VERSION);  // 0.1.0
#ifdef MOBILEMAMBA_CUDA_ARCHS
inline constexpr const char* cuda_archs = MOBILEMAMBA_STRING(MOBILEMAMBA_CUDA_ARCHS);  // sm_80,sm_90+PTX
#endif

}  // namespace mobilemamba::build
