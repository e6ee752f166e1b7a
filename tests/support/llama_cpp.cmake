# SPDX-License-Identifier: MIT
#
# The pinned llama.cpp with shared libraries, for the programs of tests/conformance and tests/machines: nothing of it
# but what a list LLAMA_PARTS names (BUILD_TOOLS, ...). Nothing is installed, and nothing is downloaded.
set(ROTARY_LLAMA_CPP_DIR "" CACHE PATH "Source of the pinned llama.cpp")
if (NOT EXISTS "${ROTARY_LLAMA_CPP_DIR}/ggml/CMakeLists.txt")
    message(FATAL_ERROR "ROTARY_LLAMA_CPP_DIR: '${ROTARY_LLAMA_CPP_DIR}' is not a llama.cpp source")
endif()

# Without git, which upstream searches for in two ways: its answer would depend on the checkout around this build, and
# what ggml_commit() says is part of what our library checks ("unknown", as in a wheel built where there is no git).
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
