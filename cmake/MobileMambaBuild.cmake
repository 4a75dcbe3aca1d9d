# What pip's build and CMake's decide alike: the oldest compilers, the default CUDA archs, and the translation units. The
# two lists stand in build_backend/ only, and are read from there.
set(build_backend ${CMAKE_CURRENT_LIST_DIR}/../build_backend)

# Refuses a C++ compiler that is too old, before anything is compiled.
function(mobilemamba_check_compiler)
  file(STRINGS ${build_backend}/mobilemamba_build.py line REGEX "^COMPILER_MINIMUM = ")
  string(REGEX MATCH "\"GCC\": ([0-9]+), \"clang\": ([0-9]+)" found "${line}")
  if(NOT found)
    message(FATAL_ERROR "build_backend/mobilemamba_build.py has no COMPILER_MINIMUM of GCC and clang")
  endif()
  set(gcc ${CMAKE_MATCH_1})
  set(clang ${CMAKE_MATCH_2})
  if((CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS gcc)
      OR (CMAKE_CXX_COMPILER_ID STREQUAL Clang AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS clang))
    message(FATAL_ERROR "The C++ compiler ${CMAKE_CXX_COMPILER} is ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}; "
      "expected GCC ${gcc} or clang ${clang} or later: set CMAKE_CXX_COMPILER to one")
  endif()
endfunction()

# The default archs that this nvcc knows, in the form of CUDA_ARCHITECTURES: machine code for each, and PTX of the last.
function(mobilemamba_default_archs nvcc result)
  file(STRINGS ${build_backend}/mobilemamba_toolkit.py line REGEX "^DEFAULT_ARCHS = ")
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" defaults "${line}")
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "compute_[0-9]+" known "${known}")
  set(archs)
  foreach(arch IN LISTS defaults)
    string(REPLACE "." "" arch ${arch})
    if(compute_${arch} IN_LIST known)
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  if(NOT archs)
    message(FATAL_ERROR "${nvcc} compiles for none of ${defaults}; set CMAKE_CUDA_ARCHITECTURES")
  endif()
  list(TRANSFORM archs REPLACE "-real$" "" AT -1)
  set(${result} ${archs} PARENT_SCOPE)
endfunction()

# The translation unit of a source: its folder's for .cpp files, except isa_*.cpp; see units() in build_backend/.
function(mobilemamba_unit source result)
  cmake_path(GET source FILENAME name)
  cmake_path(GET source PARENT_PATH folder)
  cmake_path(GET folder FILENAME folder)
  if(NOT name MATCHES "\\.cpp$" OR name MATCHES "^isa_")
    set(folder "")
  endif()
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

# CUDA_ARCHITECTURES in pip's words, for messages: sm_90 for 90-real, sm_120+PTX for 120.
function(mobilemamba_arch_names archs result)
  list(TRANSFORM archs REPLACE "^([0-9]+[af]?)$" "sm_\\1+PTX")
  list(TRANSFORM archs REPLACE "^([0-9]+[af]?)-real$" "sm_\\1")
  list(TRANSFORM archs REPLACE "^([0-9]+[af]?)-virtual$" "compute_\\1")
  list(JOIN archs "," archs)
  set(${result} ${archs} PARENT_SCOPE)
endfunction()
