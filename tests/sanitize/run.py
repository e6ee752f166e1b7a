# SPDX-License-Identifier: MIT
"""Run the native tests with a library built with sanitizers: ASan and UBSan, or TSan.

    python -m tests.sanitize.run [address|thread ...] [--only tests,archs] [-k EXPRESSION]

Builds the library in build/sanitize/<kind>/native; llama.cpp is not instrumented, except for upstream's
program under TSan. For that llama.cpp is built once, which takes minutes, with TSan and without OpenMP, whose
barriers TSan does not know. A sanitizer's report ends its process and is printed at the end, even if a test
hides that process's output. The .supp files in this folder suppress reports about others' code, each with its
reason. Exit status: 0 clean.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rotary_llamacpp import pinned
from tests.support import ROOT

HERE = Path(__file__).resolve().parent

KINDS = ("address", "thread")
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Tests that run native code, except those of Python or stock, and those that measure memory or make it fail.
ROOMS = ("native", "model", "faults")
LEFT_OUT = (
    "model/test_activation.py", "model/test_fork.py", "model/test_memory.py", "model/test_synth.py",
    "model/test_tiny_model.py", "faults/test_exhaustion.py", "faults/test_exhaustion_io.py",
    "faults/test_memory_pressure.py",
)  # fmt: skip
# A sanitizer's own memory is most of the process's and lies anywhere, so that tests that measure memory or
# limit address space mean nothing. It also starts threads itself, where some tests let the C++ library fail.
NOT_THESE = (
    "auto_budget_shrinks", "a_stated_budget_is_not_lowered", "no_address_space", "nobody_elses_memory",
    "a_tier_that_the_system_refuses", "threads_that_cannot_be_started", "neither_io_uring_nor_threads",
)  # fmt: skip
# Architectures for test-llama-archs: by default all; under TSan, where each takes minutes, only these.
ARCHS = {"address": (), "thread": ("qwen3moe", "deepseek2")}
STORES = ({"DIRECT": "0"}, {"DIRECT": "1"}, {"STORE": "direct"})


def llama_cpp() -> Path:
    """The source of the pinned llama.cpp."""
    there = ROOT / "build" / "sdist" / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    return Path(os.environ.get("ROTARY_LLAMA_CPP_DIR", there)).resolve()


def tool(name: str) -> str:
    """Path of cmake or ninja: beside the Python that runs this, or the system's."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


def cmake(source: Path, build: Path, *options: str, targets: tuple[str, ...] = ()) -> None:
    """Configure and build a CMake project."""
    build.mkdir(parents=True, exist_ok=True)
    common = (f"-DROTARY_LLAMA_CPP_DIR={llama_cpp()}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    command = [tool("cmake"), "-S", str(source), "-B", str(build), "-G", "Ninja", *common, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wanted = [word for target in targets for word in ("--target", target)]
    subprocess.run([tool("cmake"), "--build", str(build), *wanted], check=True, stdout=subprocess.DEVNULL)


def build(kind: str, with_programs: bool) -> tuple[Path, Path]:
    """Build the library; returns its path and the folder of upstream's programs and libraries."""
    place = ROOT / "build" / "sanitize" / kind
    cmake(ROOT, place / "native", f"-DROTARY_SANITIZE={kind}", "-DROTARY_CUDA=OFF")
    programs = ROOT / "build" / "conformance" / "bin"
    if kind == "thread" and with_programs:
        flags = "-fsanitize=thread -g1 -fno-omit-frame-pointer"
        options = (f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}", "-DGGML_OPENMP=OFF")
        cmake(
            ROOT / "tests" / "conformance", place / "upstream", "-DCMAKE_BUILD_TYPE=Release", *options,
            targets=("preload", "test-llama-archs"),
        )  # fmt: skip
        programs = place / "upstream" / "bin"
    return place / "native" / "libggml-rotary.so", programs


def shared_library(name: str) -> str:
    """Path of a shared library of the compiler."""
    compiler = os.environ.get("CC", "cc")
    said = subprocess.run(
        [compiler, f"-print-file-name={name}"], check=True, stdout=subprocess.PIPE, text=True
    )
    return str(Path(said.stdout.strip()).resolve())


def reports(kind: str) -> Path:
    """Path to which a sanitizer appends a process's id for the report of that process."""
    return ROOT / "build" / "sanitize" / kind / "report"


def environment(kind: str, library: Path) -> dict[str, str]:
    """The environment of a process that runs with the sanitizer."""
    log = f"log_path={reports(kind)}"
    found = {key: value for key, value in os.environ.items() if not key.startswith("ROTARY_")}
    found |= {
        "ROTARY_LIBRARY": str(library),
        "ROTARY_TESTS_CXXFLAGS": f"-fsanitize={kind} -g",
        # The runtime must come first; without libstdc++ it does not find the functions that throw.
        "LD_PRELOAD": f"{shared_library(RUNTIMES[kind])} {shared_library('libstdc++.so.6')}",
        "OMP_WAIT_POLICY": "passive",
        # Python and llama.cpp do not free everything at exit, so that only `archs` detects leaks.
        "ASAN_OPTIONS": f"{log}:detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": f"{log}:print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": f"{log}:halt_on_error=1:history_size=4:suppressions={HERE}/thread.supp",
        "LSAN_OPTIONS": f"suppressions={HERE}/leak.supp:print_suppressions=0",
    }
    return found


def tests(kind: str, library: Path, expression: str | None) -> bool:
    """Run the Python tests of ROOMS; returns whether all passed."""
    which = [f"tests/{room}" for room in ROOMS] + [f"--ignore=tests/{name}" for name in LEFT_OUT]
    wanted = (
        f"({expression}) and not ({' or '.join(NOT_THESE)})"
        if expression
        else f"not ({' or '.join(NOT_THESE)})"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *which, "-k", wanted]
    env = environment(kind, library)
    if kind == "thread":
        env |= {"OMP_THREAD_LIMIT": "1", "OPENBLAS_NUM_THREADS": "1"}  # see thread.supp
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode == 0


def archs(kind: str, library: Path, programs: Path) -> bool:
    """Run test-llama-archs on ROTARY0 with two slots for eight experts; returns whether all are clean."""
    clean = True
    chosen = [["-a", arch] for arch in ARCHS[kind]] or [[]]
    for store, options in itertools.product(STORES, chosen):
        env = environment(kind, library)
        env |= {f"ROTARY_{key}": value for key, value in {"BUDGET": "min", "INNER": "CPU", **store}.items()}
        env["GGML_BACKEND_PATH"] = str(library)
        env["LD_PRELOAD"] += f" {programs / 'libpreload.so'}"
        env["ASAN_OPTIONS"] = env["ASAN_OPTIONS"].replace("detect_leaks=0", "detect_leaks=1")
        command = [str(programs / "test-llama-archs"), "-b", "ROTARY0", "-s", "1", *options]
        ran = subprocess.run(command, env=env, check=False, capture_output=True)
        said = (ran.stdout + ran.stderr).decode(errors="replace")
        good = ran.returncode == 0
        verdict = "clean" if good else f"exit status {ran.returncode}"
        print(f"{kind}: test-llama-archs {' '.join(options)}, {store}: {verdict}", flush=True)
        if not good:
            print(said[-12000:])
            clean = False
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=[], help="address, thread; both by default")
    parser.add_argument("--only", default="tests,archs")
    parser.add_argument("-k", dest="expression", help="of tests, as pytest has it")
    given = parser.parse_args()
    clean = True
    for kind in given.kinds or KINDS:
        library, programs = build(kind, "archs" in given.only)
        for old in reports(kind).parent.glob(reports(kind).name + ".*"):
            old.unlink()
        if "tests" in given.only:
            clean = tests(kind, library, given.expression) and clean
        if "archs" in given.only:
            clean = archs(kind, library, programs) and clean
        for report in sorted(reports(kind).parent.glob(reports(kind).name + ".*")):
            print(f"{report}:\n{report.read_text(errors='replace')[:12000]}")
            clean = False
    print("sanitizers: clean" if clean else "sanitizers: not clean")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
