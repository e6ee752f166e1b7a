# SPDX-License-Identifier: MIT
"""Paging experts to a GPU against everything that stock llama.cpp can do with the same card, side by side.

Made for a machine with a GPU, CMake and nvcc but no network. Pack what it needs on a machine with a network:

    python benchmarks/gpu.py pack                      writes build/gpu-pack, some 10 MB, to be copied along

and then, on the machine with the GPU, in the root of the source:

    python3 benchmarks/gpu.py build                    llama.cpp with ggml-cuda for this card, and Rotary
    python3 benchmarks/gpu.py test                     tests/gpu
    python3 benchmarks/gpu.py models                   Qwen3-30B-A3B's and Mixtral 8x22B's shapes, Q4_0
    python3 benchmarks/gpu.py measure --json out.json  the table

The budgets stand for smaller cards. `measure --dry-run` runs everything with a tiny model on the CPU and the
installed llama_cpp; its figures mean nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script it finds only its own folder
PACK, WORK = ROOT / "build" / "gpu-pack", ROOT / "build" / "gpu"
SITE, LLAMA, LIBRARIES, MODELS = WORK / "site", WORK / "llama.cpp", WORK / "lib", WORK / "models"
sys.path[1:1] = [str(SITE)] if SITE.is_dir() else [str(wheel) for wheel in PACK.glob("click-*.whl")]

import click  # noqa: E402

from rotary_llamacpp.host.machine import cpu_count  # noqa: E402

WHEELS = (
    "gguf", "cffi", "pycparser", "click", "tqdm", "numpy", "diskcache", "jinja2", "markupsafe",
    "typing_extensions", "pyyaml", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "pytest",
    "pluggy", "iniconfig", "packaging", "pygments",
)  # fmt: skip
# The parts of llama.cpp from which its libraries for CPU and CUDA are built.
SOURCES = (
    "CMakeLists.txt",
    "LICENSE",
    "cmake",
    "include",
    "src",
    "ggml",
    "vendor",
    "licenses",
    "scripts/build-info.sh",
)
NOT_SOURCES = (
    "metal", "hexagon", "sycl", "vulkan", "opencl", "webgpu", "openvino", "cann", "et", "virtgpu", "zdnn",
    "zendnn",
)  # fmt: skip

SHAPES = {
    "qwen3-30b-a3b": {"layers": 24, "locality": 0.38},
    "mixtral-8x22b": {"layers": 12, "locality": None},
}
BUDGETS = ("12.5%", "25%", "50%", "100%")
LINK_BYTES = 1 << 30


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    pass


# ---- packing


@main.command(help="Gather what a machine without a network needs.")
@click.option("--python-version", default="3.12", show_default=True, help="Of that machine.")
def pack(python_version: str) -> None:
    llama = Path(os.environ.get("ROTARY_LLAMA_CPP_DIR") or newest("build/sdist/*/vendor/llama.cpp"))
    shutil.rmtree(PACK, ignore_errors=True)
    PACK.mkdir(parents=True)

    def wanted(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if any(f"/ggml-{name}" in info.name for name in NOT_SOURCES) else info

    with tarfile.open(PACK / "llama.cpp.tar.xz", "w:xz") as tar:
        for name in SOURCES:
            if (llama / name).exists():
                tar.add(llama / name, f"llama.cpp/{name}", filter=wanted)
    with tarfile.open(PACK / "llama_cpp.tar.xz", "w:xz") as tar:
        tar.add(llama.parent.parent / "llama_cpp", "llama_cpp")
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "1")]
    run(
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms,
        f"--python-version={python_version}", "--implementation=cp", "-d", PACK, *WHEELS,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in PACK.iterdir())
    click.echo(f"{PACK}: {size / 1e6:.1f} MB")


def newest(pattern: str) -> Path:
    found = sorted(ROOT.glob(pattern))
    if not found:
        raise click.ClickException(f"{pattern}: nothing there; run `make` once, or set ROTARY_LLAMA_CPP_DIR")
    return found[-1]


def run(*command: object, **options: Any) -> None:
    try:
        subprocess.run([str(part) for part in command], check=True, **options)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise click.ClickException(f"{command[0]}: {error}") from None


# ---- building


@main.command(help="Build llama.cpp with ggml-cuda for one architecture, and Rotary against it.")
@click.option("--arch", default="native", show_default=True, help="CUDA architecture, such as 90.")
@click.option("--flash-attention", is_flag=True, help="With CUDA's flash attention: three times as long.")
@click.option("--jobs", default=cpu_count(), show_default="all that may be used")
@click.option("--no-cuda", is_flag=True, help="To try the building itself where there is no GPU.")
def build(arch: str, flash_attention: bool, jobs: int, no_cuda: bool) -> None:
    if not PACK.is_dir():
        raise click.ClickException(f"{PACK}: not there; run `gpu.py pack` where there is a network")
    from rotary_llamacpp import pinned

    WORK.mkdir(parents=True, exist_ok=True)
    if not SITE.is_dir():
        for name in ("llama.cpp", "llama_cpp"):
            with tarfile.open(PACK / f"{name}.tar.xz") as tar:
                tar.extractall(WORK if name == "llama.cpp" else SITE)
        for wheel in PACK.glob("*.whl"):
            shutil.unpack_archive(wheel, SITE, "zip")
        # Rotary asks for the installed version of llama-cpp-python, which only metadata tell.
        about = SITE / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}.dist-info" / "METADATA"
        about.parent.mkdir()
        about.write_text(
            f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {pinned.LLAMA_CPP_PYTHON}\n"
        )
    if shutil.which("ninja"):
        os.environ.setdefault("CMAKE_GENERATOR", "Ninja")
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if Path(nvcc).exists():
        os.environ.setdefault("CUDACXX", nvcc)
    # The loader may not know the toolkit's folder, so that it becomes part of the RPATH.
    toolkit = Path(nvcc).resolve().parent.parent / "lib64"
    native = WORK / "build-llama"
    run(
        "cmake", "-S", LLAMA, "-B", native, "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON",
        *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")),
        f"-DGGML_CUDA={'OFF' if no_cuda else 'ON'}", f"-DGGML_CUDA_FA={'ON' if flash_attention else 'OFF'}",
        f"-DCMAKE_CUDA_ARCHITECTURES={arch}", "-DGGML_CCACHE=OFF", f"-DCMAKE_INSTALL_RPATH=$ORIGIN;{toolkit}",
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DLLAMA_OPENSSL=OFF",
    )  # fmt: skip
    run("cmake", "--build", native, "-j", jobs)
    LIBRARIES.mkdir(exist_ok=True)
    for library in native.glob("bin/*.so*"):
        (LIBRARIES / library.name).unlink(missing_ok=True)
        shutil.copy2(library, LIBRARIES, follow_symlinks=False)
    # This ggml is built without git and reports commit "unknown"; Rotary then compares versions.
    ours = WORK / "build-rotary"
    run(
        "cmake", "-S", ROOT, "-B", ours, f"-DROTARY_LLAMA_CPP_DIR={LLAMA}",
        f"-DROTARY_CUDA={'OFF' if no_cuda else 'ON'}",
        *([] if arch == "native" else [f"-DROTARY_CUDA_ARCHITECTURES={arch}"]),
    )  # fmt: skip
    run("cmake", "--build", ours, "-j", jobs)
    run("cmake", "--install", ours, "--prefix", ROOT / "rotary_llamacpp")
    click.echo(f"built {', '.join(sorted(path.name for path in LIBRARIES.glob('*.so')))}")


def environment() -> None:
    """Set the environment so that child processes use the libraries built here, if there are any."""
    if LIBRARIES.is_dir():
        os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARIES)
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(SITE)])


@main.command(
    help="Run tests/gpu with what has been built.", context_settings={"ignore_unknown_options": True}
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def test(arguments: tuple[str, ...]) -> None:
    environment()
    run(
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        ROOT / "tests" / "gpu",
        *arguments,
    )


# ---- models


@main.command(help="Write the models.")
@click.option("--type", "type_", default="q4_0", show_default=True)
@click.option("--shapes", default=",".join(SHAPES), show_default=True)
def models(type_: str, shapes: str) -> None:
    for shape in shapes.split(","):
        start = time.monotonic()
        path = model_of(shape, type_)
        click.echo(f"{path}: {path.stat().st_size / 1e9:.1f} GB, {time.monotonic() - start:.0f} s")


def model_of(shape: str, type_: str) -> Path:
    from benchmarks.common import synthetic

    options = dict(SHAPES[shape])
    return synthetic(MODELS, shape, type_, options.pop("locality"), **options)


# ---- measuring


class BufferTypeOverride(ctypes.Structure):
    """llama_model_tensor_buft_override of llama.h; an array of them ends with an empty one."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one variant in this process: medians of decode and prefill in tokens per second, statistics.

    `job` has the keys model, config (for Llama's ``rotary``; None for stock), experts_on_cpu, op_offload,
    n_gpu_layers, prompts, batches, n_decode, rounds, n_threads.
    """
    import numpy as np

    from benchmarks.common import last_logits
    from rotary_llamacpp import Llama
    from rotary_llamacpp.native import binding as _native
    from rotary_llamacpp.runtime.paging import default_model_params

    keep: list[Any] = []

    def experts_on_cpu(params: Any) -> None:
        buffer_type = _native.libllama().ggml_backend_cpu_buffer_type
        buffer_type.restype = ctypes.c_void_p
        overrides = (BufferTypeOverride * 2)()
        overrides[0].pattern = rb"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
        overrides[0].buft = buffer_type()
        keep.append(overrides)
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)

    longest = max(job["prompts"])
    with default_model_params(experts_on_cpu if job["experts_on_cpu"] else lambda params: None):
        llama = Llama(
            job["model"], rotary=job["config"], n_gpu_layers=job["n_gpu_layers"], n_ctx=longest + 1024,
            n_batch=longest, n_ubatch=min(longest, 2048), op_offload=job["op_offload"], verbose=False,
            n_threads=job["n_threads"], n_threads_batch=job["n_threads"],
        )  # fmt: skip
    rng = np.random.default_rng(0)
    n_vocab = llama.n_vocab()

    def tokens(n: int) -> list[int]:
        return [int(token) for token in rng.integers(10, n_vocab - 1, n)]

    found: dict[str, Any] = {"prefill": {}, "decode": {}, "stats": {}}
    digest = hashlib.sha256()
    for n in job["prompts"]:
        prompt, speeds = tokens(n), []
        for _ in range(job["rounds"] + 1):
            llama.reset()
            start = time.perf_counter()
            llama.eval(prompt)
            digest.update(last_logits(llama).tobytes())
            speeds.append(n / (time.perf_counter() - start))
        found["prefill"][str(n)] = statistics.median(speeds[1:])
    for batch in job["batches"]:
        llama.reset()
        llama.eval(tokens(64))
        speeds, before = [], {}
        for number in range(job["rounds"] + 1):
            if number == 1:  # warm
                llama.rotary_reset_stats()
            steps = [tokens(batch) for _ in range(job["n_decode"])]
            start = time.perf_counter()
            for step in steps:
                llama.eval(step)
            digest.update(last_logits(llama).tobytes())
            speeds.append(job["n_decode"] * batch / (time.perf_counter() - start))
        found["decode"][str(batch)] = statistics.median(speeds[1:])
        before = llama.rotary_stats()
        found["stats"][str(batch)] = {key: value for key, value in before.items() if key != "layers"}
    found["logits"] = digest.hexdigest()[:12]
    llama.close()
    return found


def pinned_copy() -> dict[str, float | None]:
    """GB/s of a plain copy from page-locked memory to the device, the fastest of five."""
    names = ("libcudart.so", "libcudart.so.13", "libcudart.so.12")
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve()
    folders = ("", f"{nvcc.parent.parent}/lib64/", "/usr/local/cuda/lib64/")
    cuda = None
    for path in (folder + name for folder in folders for name in names):
        try:
            cuda = ctypes.CDLL(path)
            break
        except OSError:
            continue
    host, device = ctypes.c_void_p(), ctypes.c_void_p()
    if (
        cuda is None
        or cuda.cudaMallocHost(ctypes.byref(host), ctypes.c_size_t(LINK_BYTES)) != 0
        or cuda.cudaMalloc(ctypes.byref(device), ctypes.c_size_t(LINK_BYTES)) != 0
    ):
        return {"link": None}
    best = 0.0
    for _ in range(5):
        cuda.cudaDeviceSynchronize()
        start = time.perf_counter()
        cuda.cudaMemcpy(device, host, ctypes.c_size_t(LINK_BYTES), 1)
        cuda.cudaDeviceSynchronize()
        best = max(best, LINK_BYTES / (time.perf_counter() - start) / 1e9)
    return {"link": best}


def variants(budgets: list[str], least: float, inner: str | None) -> dict[str, dict[str, Any]]:
    """The variants to compare, by name: fields of the job, and environment; no budgets below `least` %."""
    plain: dict[str, Any] = {"config": None, "experts_on_cpu": False, "op_offload": True, "environment": {}}
    found = {
        "resident": plain,
        "ncmoe all": {**plain, "experts_on_cpu": True, "op_offload": False},
        "op-offload": {**plain, "experts_on_cpu": True},
    }
    for budget in budgets:
        if float(budget.rstrip("%")) < least:
            continue  # too small for the experts of one token
        config = {"budget": budget, "pin": "on", "verbose": False, **({"inner": inner} if inner else {})}
        host = {"ROTARY_DEVICE_LOOKUPS": "0"}
        found[f"rotary, host, {budget}"] = {**plain, "config": config, "environment": host}
        found[f"rotary, no prefetch, {budget}"] = {**plain, "config": {**config, "prefetch": False}}
        found[f"rotary, device, {budget}"] = {**plain, "config": config}
    return found


@main.command("measure", help="Measure all variants on all models, and print a table for each.")
@click.option("--type", "type_", default="q4_0", show_default=True)
@click.option("--shapes", default=",".join(SHAPES), show_default=True)
@click.option("--budgets", default=",".join(BUDGETS), show_default=True)
@click.option("--only", help="Variants whose name contains this.")
@click.option("--rounds", default=3, show_default=True)
@click.option("-n", "n_decode", default=32, show_default=True, help="Decoded steps in a round.")
@click.option("--threads", default=cpu_count(), show_default="all that may be used")
@click.option("--limit", default=300.0, show_default=True, help="Seconds for one variant.")
@click.option("--dry-run", is_flag=True, help="A tiny model on the CPU: figures mean nothing.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all figures here; what is there already is not measured again.",
)
def measure_all(
    type_: str, shapes: str, budgets: str, only: str | None, rounds: int, n_decode: int, threads: int,
    limit: float, dry_run: bool, json_path: Path | None,
) -> None:  # fmt: skip
    from benchmarks.common import ProcessFailed, cpu_name, in_process, synthetic
    from rotary_llamacpp.gguf_files.info import ModelInfo

    environment()
    everything: dict[str, Any] = {
        "machine": {"cpu": cpu_name(), **gpu(), **in_process_link(dry_run)},
        "models": {},
    }
    base: dict[str, Any] = {"prompts": [512, 4096], "batches": [1, 8], "n_gpu_layers": -1}
    base.update(rounds=rounds, n_decode=n_decode, n_threads=threads)
    if dry_run:
        base.update(prompts=[32, 64], rounds=1, n_decode=4, n_gpu_layers=0)
    if json_path and json_path.exists():  # measure only what is missing
        everything["models"] = json.loads(json_path.read_text())["models"]
    machine = everything["machine"]
    link = number(machine["link"])
    click.echo(f"{machine['gpu']}, {machine['cpu']}, {threads} threads; page-locked copy {link} GB/s")
    for shape in ["test"] if dry_run else shapes.split(","):
        folder = json_path.parent if json_path and dry_run else MODELS
        model = synthetic(folder, shape, type_, None) if dry_run else model_of(shape, type_)
        results: dict[str, Any] = everything["models"].setdefault(model.name, {})
        info = ModelInfo.read(model)
        least = 100 * info.min_budget_bytes / info.expert_bytes
        for name, fields in variants(budgets.split(","), least, "CPU" if dry_run else None).items():
            if (only and only not in name) or "decode" in results.get(name, {}):
                continue
            job = {**base, **fields, "model": str(model)}
            changed = job.pop("environment")
            os.environ.update(changed)
            try:
                results[name] = in_process("benchmarks.gpu", "measure", job, timeout=limit)
            except (ProcessFailed, subprocess.TimeoutExpired) as error:
                results[name] = {"failed": str(error)[-300:]}
            for key in changed:
                del os.environ[key]
            click.echo(f"{shape}, {name}: {results[name].get('failed') or results[name]['decode']}", err=True)
            if json_path:
                json_path.write_text(json.dumps(everything, indent=1))
        click.echo("\n" + "\n".join(table(model, results)))


def gpu() -> dict[str, str]:
    """Name and driver of the card, from nvidia-smi."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True)
        return {"gpu": found.stdout.splitlines()[0]}
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"gpu": "no GPU"}


def in_process_link(dry_run: bool) -> dict[str, Any]:
    from benchmarks.common import in_process

    return {"link": None} if dry_run else in_process("benchmarks.gpu", "pinned_copy", timeout=120)


def number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def table(model: Path, results: dict[str, Any]) -> list[str]:
    """Table of all variants. "link GB/s": bytes paged per token, divided by its time over "resident"."""
    done = {name: result for name, result in results.items() if "failed" not in result}
    some = next(iter(done.values()), {"prefill": {}, "decode": {}})
    prompts, batches = list(some["prefill"]), list(some["decode"])
    resident = done.get("resident")
    lines = [f"### {model.name}, {model.stat().st_size / 1e9:.1f} GB", ""]
    decodes, prefills = (f"decode, batch {n}" for n in batches), (f"prefill {n}" for n in prompts)
    heads = ["variant", *decodes, *prefills, "of resident", "hit rate", "link GB/s", "logits"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"| {name} | failed: {' '.join(result['failed'].split())[:160]} |")
            continue
        one = batches[0]
        stats = result["stats"][one]
        of_resident = resident and result["decode"][one] / resident["decode"][one]
        bandwidth = None
        if resident and stats["lookups"]:
            n_tokens = stats["lookups"] / stats["n_layers"]
            longer = 1 / result["decode"][one] - 1 / resident["decode"][one]
            bandwidth = stats["bytes_paged"] / n_tokens / longer / 1e9 if longer > 0 else None
        cells = [
            name,
            *(number(result["decode"][n]) for n in batches),
            *(number(result["prefill"][n], ".0f") for n in prompts),
            number(of_resident, ".2f"),
            number(stats["hit_rate"], ".1%"),
            number(bandwidth),
            result["logits"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
