# SPDX-License-Identifier: MIT
"""Expected skips, by test and reason: what a machine may lack. `make test` fails on any other skip."""

from __future__ import annotations

import re

# Regular expressions for the beginning of a test's name below tests/, and for the reason.
EXPECTED = (
    (r"gpu/", r"no NVIDIA GPU|no compute-sanitizer"),
    (r"model/test_link", r"built without nvcc"),
    # The kernel, or the sandbox around it.
    (r"faults/test_(reader_faults|exhaustion)", r"no io_uring here"),
    (r"faults/test_reader_faults", r"no seccomp here|the kernel cannot inject results into io_uring"),
    (r"faults/test_reader_faults.*seccomp", r"io_uring's syscalls are unknown here"),
    (r"faults/test_native_fallbacks", r"no address space can be reserved here"),
    # The user who runs the tests, and what root may do here.
    (r"faults/test_direct_faults", r"only root may have loop devices|no (losetup|mkfs.ext4|u?mount)$"),
    (r"faults/test_direct_faults", r"no loop device|cannot mount"),
    (r"faults/test_memory_pressure", r"only root may make cgroups|no memory cgroup below which"),
    (r"unit/test_benchmarks.*beyond_ram", r"memory cannot be limited: "),
    (r"unit/test_disk.*overlay", r"no unshare|no overlay can be mounted"),
    (r"cli/test_command_faults.*secret", r"this user may read any file"),
    # The file system of temporary files.
    (r"unit/test_disk", r".*the kernel does not count its reads|/dev/shm: no tmpfs|no stat -f"),
    (
        r"model/test_direct",
        r".*(lies in memory|keeps files in memory|refuses direct reads)|/dev/shm: no tmpfs",
    ),
    (r"faults/test_memory_pressure", r".*lies in memory"),
    (r"cli/test_command_faults", r"no /dev/full|this file system accepts only names that are text"),
    # The processor.
    (r"model/test_mixed_stores", r"this CPU repacks no weight"),
    # Not installed with the test dependencies, or not in the checkout.
    (r"conversion/test_hugging_face", r".* not installed, which llama.cpp's converter imports"),
    (r"native/test_native_budget", r"localedef cannot make a language here"),
    (r"docs/test_links", r"mkdocs-material is not installed"),
    (r"unit/test_public", r"mypy is not installed"),
    (r"(native|model)/.*real_", r".*route.csv: not here"),
    (r"install/test_install", r"no package index can be reached"),
)


def is_expected(test: str, reason: str) -> bool:
    """Whether the test of this node id may be skipped for this reason."""
    name = test.removeprefix("tests/")
    return any(re.match(where, name) and re.match(why, reason) for where, why in EXPECTED)
