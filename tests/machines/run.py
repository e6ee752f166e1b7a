# SPDX-License-Identifier: MIT
"""Emulated machines (`make machines`): the library on other processors and page sizes, without io_uring.

    python -m tests.machines.run LLAMA_CPP [MACHINE...]

Builds the library and upstream's llama-simple for x86-64 and aarch64 in build/machines/<arch>, runs them
under Debian's qemu-user, and prints one line per machine. Greedy text of the committed model, paged from the
mapping and with direct reads, must equal that of stock llama.cpp on the same machine. qemu-user has no
io_uring, so that direct reads use threads there; this machine, which comes first, may use io_uring.

The column "installed" tells how the package loads with the llama-cpp-python compiled on this machine: it must
run here, and on other machines run or raise an error instead of dying of an illegal instruction.

Exit status: 0 if all is well, 1 if not, 2 if something that is needed is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

BUILD = ROOT / "build" / "machines"
MODEL = ROOT / "models" / "tiny-moe-q8_0.gguf"

ARGS = ["-m", str(MODEL), "-n", "64", "In the beginning"]
BUDGETS = ["min", "25%"]
NO_INSTRUCTIONS = {"LLAMAFILE", "OPENMP", "REPACK"}  # ggml's features that are not instructions
MIN_WORDS = 25  # of the text, so that the comparison means something
HANGS_S = 1800


@dataclass(frozen=True)
class Machine:
    name: str
    arch: str
    cpu: str | None  # qemu's name; None for no emulation
    page_bytes: int = 4096


# qemu 7.2 emulates AVX2 but not AVX-512, which its models of processors with AVX-512 lack. It has no Neoverse
# V1 and V2: "max" with their vector lengths stands for them. The page size depends on the kernel: 16 KiB on
# the Raspberry Pi 5, 64 KiB on some distributions' servers.
MACHINES = [
    Machine("this-machine", platform.machine(), None),
    Machine("qemu64", "x86_64", "qemu64"),
    Machine("Nehalem", "x86_64", "Nehalem"),
    Machine("SandyBridge", "x86_64", "SandyBridge"),
    Machine("Haswell", "x86_64", "Haswell"),
    Machine("Skylake-Server", "x86_64", "Skylake-Server"),
    Machine("Icelake-Server", "x86_64", "Icelake-Server"),
    Machine("EPYC-Rome", "x86_64", "EPYC-Rome"),
    Machine("EPYC-Milan", "x86_64", "EPYC-Milan"),
    Machine("x86-max", "x86_64", "max"),
    Machine("Raspberry-Pi-4", "aarch64", "cortex-a72"),
    Machine("Raspberry-Pi-5", "aarch64", "cortex-a76", 16384),
    Machine("Graviton-2", "aarch64", "neoverse-n1"),
    Machine("Graviton-2-64K", "aarch64", "neoverse-n1", 65536),
    Machine("A64FX", "aarch64", "a64fx"),
    Machine("Graviton-3", "aarch64", "max,sve128=on,sve256=on,sve-default-vector-length=32"),
    Machine("Graviton-4", "aarch64", "max,sve128=on,sve-default-vector-length=16"),
]

# The variants of llama.cpp's CPU backend that the machines above choose, and an AVX-512 one for this machine.
VARIANTS = {
    "x86_64": ["x64", "sse42", "sandybridge", "haswell", "icelake"],
    "aarch64": ["armv8.0_1", "armv8.2_2", "armv8.6_2"],
}


# Loads the package, in the Python that runs this.
LOAD = """if True:
    import numpy
    print("no answer", flush=True)
    from rotary_llamacpp.native import binding as _native
    from rotary_llamacpp.errors import LibraryError
    try:
        _native.load()
        print("runs")
    except LibraryError as error:
        print("refused" if "illegal instruction" in str(error) else error)
"""


class Missing(Exception):
    """Something must be installed or built first; the text says what."""


# ---- what is needed


def check_tools(machines: list[Machine]) -> None:
    """Raise Missing with all programs that are not installed, and the Debian packages that contain them."""
    wanted = {}  # program -> package
    for each in machines:
        if each.cpu is not None:
            wanted[f"qemu-{each.arch}"] = "qemu-user"
        if each.arch != platform.machine():
            wanted[f"{each.arch}-linux-gnu-g++"] = f"g++-{each.arch.replace('_', '-')}-linux-gnu"
    missing = {program: package for program, package in wanted.items() if not shutil.which(program)}
    if missing:
        raise Missing(
            f"machines: {', '.join(missing)} not found; needed to emulate other processors; install them "
            f"(Debian: apt-get install {' '.join(sorted(set(missing.values())))})"
        )
    if not MODEL.is_file():
        raise Missing(f"{MODEL.relative_to(ROOT)}: not there; the committed model is run; check it out again")


def libraries(arch: str) -> Path:
    """The folder for qemu's -L: the parent of the `lib` with the cross compiler's C library for `arch`."""
    command = [f"{arch}-linux-gnu-g++", "-print-file-name=libc.so.6"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        raise Missing(
            f"{arch}-linux-gnu-g++: it has no libc.so.6; the C library to link with; install it "
            f"(Debian: apt-get install libc6-dev-{ {'aarch64': 'arm64', 'x86_64': 'amd64'}[arch] }-cross)"
        )
    return Path(found).resolve().parent.parent


def build(arch: str, llama_cpp: Path) -> None:
    tools = Path(sys.executable).parent  # cmake and ninja of the virtual environment
    path = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"
    configure = ["cmake", "-S", str(ROOT / "tests" / "machines"), "-B", str(BUILD / arch), "-G", "Ninja"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DROTARY_LLAMA_CPP_DIR={llama_cpp}"]
    configure += [f"-DROTARY_CPU_VARIANTS={';'.join(VARIANTS[arch])}"]
    if arch != platform.machine():
        toolchain = ROOT / "tests" / "machines" / "toolchain.cmake"
        configure += [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", f"-DROTARY_ARCH={arch}"]
    progress = [sys.executable, str(ROOT / ".ci" / "progress.py")]
    shell = ["sh", "-ec", '"$@"; exec cmake --build "$0"', str(BUILD / arch)]
    command = [*progress, f"machines for {arch}", str(BUILD / f"{arch}.log"), *shell, *configure]
    if subprocess.run(command, env=os.environ | {"PATH": path}, check=False).returncode != 0:
        raise Missing(f"machines: not built for {arch}, see above; mend what the compiler names")


# ---- runs


def emulator(machine: Machine) -> list[str]:
    """The words before a command that run it on this machine."""
    if machine.cpu is None:
        return []
    qemu = [f"qemu-{machine.arch}", "-cpu", machine.cpu, "-p", str(machine.page_bytes)]
    return qemu if machine.arch == platform.machine() else [*qemu, "-L", str(libraries(machine.arch))]


def last_line(text: str) -> str:
    return (text.strip() or "nothing said").splitlines()[-1][:200]


def run(machine: Machine, program: str, *args: str, **environment: str) -> tuple[str, str]:
    """Run a program of the build; returns its stdout and stderr.

    Raises
    ------
    RuntimeError
        The program failed or hung; the text has its last line.
    """
    directory = BUILD / machine.arch / "bin"
    command = [*emulator(machine), str(directory / program), *args]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ROTARY_", "GGML_", "LLAMA_", "QEMU_"))}
    # Two threads are work enough for the emulation; waiting threads must not spin.
    kept |= {"OMP_THREAD_LIMIT": "2", "OMP_WAIT_POLICY": "passive", "LD_LIBRARY_PATH": str(directory)}
    try:
        done = subprocess.run(
            command,
            env=kept | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HANGS_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{program}: not done in {HANGS_S} s") from None
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    if done.returncode != 0:
        raise RuntimeError(f"{program}: exit status {done.returncode}: {last_line(err or out)}")
    return out, err


def compare(machine: Machine, stock: str, store: str) -> str:
    """Page with `store` at each budget; returns "equal" if the text is that of `stock`, else the problem."""
    for budget in BUDGETS:
        try:
            text, log = run(
                machine,
                "llama-simple",
                *ARGS,
                GGML_BACKEND_PATH=str(BUILD / machine.arch / "bin" / "libggml-rotary.so"),
                ROTARY_INNER="CPU",
                ROTARY_BUDGET=budget,
                ROTARY_STORE=store,
                ROTARY_STATS="1",
            )
        except RuntimeError as error:
            return f"budget {budget}: {error}"
        count = {key: int(value) for key, value in re.findall(r"\b(\w+)=(\d+)\b", log)}
        if text != stock:
            return f"budget {budget}: {text!r}, stock {stock!r}"
        if not (count.get("misses") and count.get("evictions")):
            return f"budget {budget}: nothing was paged"
        if (count.get("bytes_read", 0) > 0) != (store == "direct"):
            return f"budget {budget}: {count.get('bytes_read')} bytes were read directly"
    if store == "mmap":
        return "equal"
    return "equal, by threads" if "reads go through threads" in log else "equal, by io_uring"


def installed(machine: Machine) -> str:
    """Load the package with the llama-cpp-python compiled here: "runs", "refused", or what went wrong."""
    if machine.arch != platform.machine() or not (ROOT / "rotary_llamacpp" / "lib").is_dir():
        return "-"
    done = subprocess.run(
        [*emulator(machine), sys.executable, "-c", LOAD],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=False,
    )
    said = done.stdout.splitlines()
    if not said:
        return "no numpy"  # numpy needs a newer processor
    return said[-1] if done.returncode == 0 else f"exit status {done.returncode}: {last_line(done.stderr)}"


def try_machine(machine: Machine) -> tuple[list[str], bool]:
    """The cells of the machine's row in the table, and whether all is well."""
    cpu = "none" if machine.cpu is None else machine.cpu.split(",")[0]
    row = [machine.name, cpu, f"{machine.page_bytes // 1024} KiB"]
    try:
        seen, log = run(machine, "processor")
        variant = re.findall(r"libggml-cpu-([\w.]+)\.so", log)[-1]
        features, page = seen.splitlines()
        stock, _ = run(machine, "llama-simple", *ARGS)
    except RuntimeError as error:
        return [*row, str(error), "", "", ""], False
    row[-1] = f"{int(page) // 1024} KiB"
    row.append(" ".join([variant, *(each for each in features.split() if each not in NO_INSTRUCTIONS)]))
    if len(stock.split()) < MIN_WORDS:
        return [*row, f"stock says only {stock!r}", "", ""], False
    row += [compare(machine, stock, store) for store in ("mmap", "direct")]
    row.append(installed(machine))
    well = all(text.startswith("equal") for text in row[-3:-1])
    there = {"-", "runs"} if machine.cpu is None else {"-", "runs", "refused", "no numpy"}
    return row, well and row[-1] in there


def main() -> int:
    llama_cpp, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    unknown = set(names) - {each.name for each in MACHINES}
    if unknown:
        known = ", ".join(each.name for each in MACHINES)
        raise Missing(f"machines: {', '.join(sorted(unknown))}: no such machine; {known}; name some of these")
    machines = [each for each in MACHINES if (not names or each.name in names) and each.arch in VARIANTS]
    check_tools(machines)
    for arch in sorted({each.arch for each in machines}):
        build(arch, llama_cpp)
    head = "machine | CPU | page | ggml's variant and its features | mmap | direct | installed | time"
    print(f"| {head} |\n|{'---|' * len(head.split(' | '))}", flush=True)
    failed = 0
    for machine in machines:
        start = time.monotonic()
        cells, well = try_machine(machine)
        failed += not well
        print(f"| {' | '.join(cells)} | {time.monotonic() - start:.0f} s |", flush=True)
    print(f"{len(machines) - failed} of {len(machines)} machines are well")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Missing as error:
        print(error, file=sys.stderr)
        sys.exit(2)
