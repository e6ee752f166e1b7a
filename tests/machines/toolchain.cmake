# SPDX-License-Identifier: MIT
#
# Cross compiles with Debian's <arch>-linux-gnu-g++; ROTARY_ARCH is aarch64 or x86_64.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${ROTARY_ARCH})
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ROTARY_ARCH)

set(CMAKE_C_COMPILER   ${ROTARY_ARCH}-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER ${ROTARY_ARCH}-linux-gnu-g++)

# Use programs of this machine, and libraries, headers and packages of the target.
set(CMAKE_FIND_ROOT_PATH /usr/${ROTARY_ARCH}-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
