# SPDX-License-Identifier: MIT
#
# Adds the pinned llama.cpp, with shared libraries, to the programs of tests/conformance and tests/machines. The list
# LLAMA_PARTS selects its parts (BUILD_TOOLS, ...). Nothing is installed or downloaded.
set(ROTARY_LLAMA_CPP_DIR "" CACHE PATH "Source of the pinned llama.cpp")
if (NOT EXISTS "${ROTARY_LLAMA_CPP_DIR}/ggml/CMakeLists.txt")
    message(FATAL_ERROR "ROTARY_LLAMA_CPP_DIR: '${ROTARY_LLAMA_CPP_DIR}' is not a llama.cpp source")
endif()

# Without git, for which upstream searches in two ways: it would report the commit of the checkout around this build,
# and the library checks ggml_commit(). Without git that is "unknown", as in a wheel built on a machine without git.
set(GIT_EXE OFF CACHE STRING "" FORCE)
set(GIT_EXECUTABLE OFF CACHE STRING "" FORCE)
set(CMAKE_DISABLE_FIND_PACKAGE_Git ON)

set(BUILD_SHARED_LIBS ON)
foreach(part OPENSSL BUILD_COMMON BUILD_TESTS BUILD_TOOLS BUILD_EXAMPLES BUILD_SERVER BUILD_APP USE_PREBUILT_UI
        ALL_WARNINGS)
    set(wanted OFF)
    if (part IN_LIST LLAMA_PARTS)
        set(wanted ON)
    endif()
    set(LLAMA_${part} ${wanted} CACHE BOOL "" FORCE)
endforeach()

set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_subdirectory(${ROTARY_LLAMA_CPP_DIR} llama.cpp EXCLUDE_FROM_ALL)
