# SPDX-License-Identifier: MIT
"""Build libggml-rotary.so with CMake and put it, with rotary.h, into the package.

Metadata is in pyproject.toml, except the requirements: the version of llama-cpp-python comes from
rotary_llamacpp/pinned.py, the only place that states it.

The headers of the pinned llama.cpp come from the directory ROTARY_LLAMA_CPP_DIR, else from the
llama-cpp-python sdist unpacked in build/sdist, which pip downloads if it is missing. `python setup.py
llama_cpp` only finds or downloads that source and prints its llama.cpp directory.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

if not sys.platform.startswith("linux") and sys.argv[1:2] != ["sdist"]:
    sys.exit(
        f"rotary-llamacpp: it does not run on {sys.platform}; it needs Linux (in Windows, WSL 2 is one); "
        "install it there"
    )

ROOT = Path(__file__).resolve().parent
SDIST_DIR = ROOT / "build" / "sdist"
PACKAGE = "rotary_llamacpp"


class BuildFailed(BaseError):
    """Shown by setuptools as one line, without a traceback."""


def pin(name: str) -> str:
    """Value assigned to `name` in pinned.py, read as text: importing it needs the library built here."""
    text = (ROOT / PACKAGE / "pinned.py").read_text()
    found = re.search(rf'^{name} = "([^"]+)"', text, re.MULTILINE)
    if not found:
        raise BuildFailed(f'{PACKAGE}/pinned.py: no line {name} = "..."')
    return found[1]


def llama_cpp_dir() -> Path:
    """Source directory of the pinned llama.cpp, downloaded if it is not there."""
    given = os.environ.get("ROTARY_LLAMA_CPP_DIR")
    if given:
        path = Path(given).resolve()
        if not (path / "ggml" / "include" / "ggml.h").is_file():
            raise BuildFailed(
                f"ROTARY_LLAMA_CPP_DIR={given}: no llama.cpp source there; unset it to download one"
            )
        return path

    version = pin("LLAMA_CPP_PYTHON")
    stem = f"llama_cpp_python-{version}"
    path = SDIST_DIR / stem / "vendor" / "llama.cpp"
    if path.is_dir():
        return path
    archive = SDIST_DIR / f"{stem}.tar.gz"
    if not archive.is_file():
        download_sdist(version)
    check_sdist(archive)
    # Unpack to a temporary folder and rename it, so that an interrupted run leaves no incomplete source.
    part = SDIST_DIR / f".{stem}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            # Early releases of 3.11, Debian 12's among them, have no filters.
            tar.extractall(part, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        (part / stem).rename(SDIST_DIR / stem)
    except (tarfile.TarError, OSError, EOFError) as err:
        raise BuildFailed(f"{archive}: cannot unpack ({err}); delete it and try again") from err
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def download_sdist(version: str) -> None:
    """Download by pip, which knows indexes, proxies and certificates; builds require it in pyproject.toml."""
    wanted = f"llama-cpp-python=={version}"
    print(f"downloading the sdist of {wanted} to {SDIST_DIR}", file=sys.stderr, flush=True)
    SDIST_DIR.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    environment.pop("PIP_BUILD_TRACKER", None)  # set by the pip that runs this build
    for pips, uvs in (
        ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
        ("PIP_INDEX_URL", "UV_INDEX_URL"),
        ("PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL"),
    ):
        if uvs in environment:
            environment.setdefault(pips, environment[uvs])
    options = ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(SDIST_DIR)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, wanted],
        env=environment,
        stdout=sys.stderr.fileno(),
        check=False,
    )
    if result.returncode != 0:
        raise BuildFailed(
            f"{wanted}: pip could not download its sdist, exit status {result.returncode}, see above; "
            "mend that, or set ROTARY_LLAMA_CPP_DIR to an unpacked one's vendor/llama.cpp"
        )


def check_sdist(archive: Path) -> None:
    wanted, found = pin("LLAMA_CPP_PYTHON_SHA256"), hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != wanted:
        raise BuildFailed(
            f"{archive}: its SHA-256 is {found}; {PACKAGE}/pinned.py says {wanted}; delete it and try again"
        )


def tool(name: str) -> str:
    """Path of cmake or ninja: the PyPI package's, else the system's."""
    try:
        module = __import__(name)
        bin_dir = getattr(module, "CMAKE_BIN_DIR", None) or getattr(module, "BIN_DIR", None)
        found = shutil.which(name, path=bin_dir) if bin_dir else None
    except ImportError:
        found = None
    found = found or shutil.which(name)
    if not found:
        raise BuildFailed(f"{name}: not found; run: pip install {name}")
    return found


def check_compiler() -> None:
    wanted = os.environ.get("CXX")
    if wanted:
        if not shutil.which(wanted.split()[0]):
            raise BuildFailed(f"CXX={wanted}: no such C++ compiler")
    elif not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise BuildFailed("no C++ compiler found; install one (Debian: g++), or set CXX to it")


class BuildNative(build_ext):
    """Runs CMake instead of compiling sources one by one."""

    def native_files(self) -> list[Path]:
        files = [Path("lib") / "libggml-rotary.so", Path("include") / "rotary.h"]
        if (ROOT / "build" / "native" / "libggml-rotary-cuda.so").is_file():
            files.append(Path("lib") / "libggml-rotary-cuda.so")
        return files

    def run(self) -> None:
        check_compiler()
        package = ROOT / PACKAGE if self.inplace else Path(self.build_lib).resolve() / PACKAGE
        build = ROOT / "build" / "native"
        cmake = tool("cmake")
        # A build directory remembers its cmake, which no longer exists after an isolated build.
        if self.stale(build):
            shutil.rmtree(build)
        # The environment may set the CMake options ROTARY_CUDA=ON|OFF and ROTARY_CUDA_ARCHITECTURES=90.
        cuda = [
            f"-D{name}={os.environ[name]}"
            for name in ("ROTARY_CUDA", "ROTARY_CUDA_ARCHITECTURES")
            if name in os.environ
        ]
        self.call(
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
            f"-DROTARY_LLAMA_CPP_DIR={llama_cpp_dir()}",
            *cuda,
        )
        self.call(cmake, "--build", str(build))
        self.call(cmake, "--install", str(build), "--prefix", str(package))

    @staticmethod
    def stale(build: Path) -> bool:
        cache = build / "CMakeCache.txt"
        if not cache.is_file():
            return False
        made_by = re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)$", cache.read_text(), re.MULTILINE)
        return not made_by or not Path(made_by[1]).exists()

    @staticmethod
    def call(*command: str) -> None:
        result = subprocess.run(command, stdout=sys.stderr.fileno(), check=False)
        if result.returncode != 0:
            raise BuildFailed(
                f"{Path(command[0]).name}: failed with exit status {result.returncode}, see above"
            )

    # setuptools calls these two of a build_ext, for wheels and for editable installs.

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / PACKAGE / file) for file in self.native_files()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {
            str(Path(self.build_lib) / PACKAGE / file): str(Path(PACKAGE) / file)
            for file in self.native_files()
        }


class PlatformWheel(bdist_wheel):
    """The library depends on the machine but not on the Python: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class LlamaCpp(Command):
    description = "download and unpack the pinned llama-cpp-python sdist; print its llama.cpp directory"
    user_options: list[tuple[str, str | None, str]] = []  # noqa: RUF012 (setuptools' own interface)

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        print(llama_cpp_dir())


setup(
    install_requires=[
        f"llama-cpp-python=={pin('LLAMA_CPP_PYTHON')}",
        "gguf",
        "numpy",
        "cffi",
        "click",
        "rich",
    ],
    ext_modules=[Extension(f"{PACKAGE}.lib", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel, "llama_cpp": LlamaCpp},
)
