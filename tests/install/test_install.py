# SPDX-License-Identifier: MIT
"""Installing: from a checkout by pip and uv, from a source distribution and from a wheel, each into an empty
environment. llama-cpp-python itself comes from the wheel that `make setup` keeps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from rotary_llamacpp import pinned
from tests.support import ROOT

pytestmark = pytest.mark.slow

WHEELS = ROOT / "build" / f"wheel-{pinned.LLAMA_CPP_PYTHON}"


def run(*command, check=True, **environment) -> subprocess.CompletedProcess[str]:
    """Run a command without the CUDA part and without the variables by which it would find this checkout."""
    env = {**os.environ, "ROTARY_CUDA": "OFF", **environment}
    for name in ("PYTHONPATH", "ROTARY_LLAMA_CPP_DIR"):
        env.pop(name, None)
    ran = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, check=False, cwd="/"
    )
    if check:
        assert ran.returncode == 0, f"{ran.args}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return ran


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> None:
    """Skip unless there is a package index and a wheel of llama-cpp-python."""
    folder = tmp_path_factory.mktemp("index")
    found = run(
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "ninja"), check=False
    )
    if found.returncode != 0:
        pytest.skip(f"no package index can be reached: {found.stderr.strip().splitlines()[-1]}")
    if not any(WHEELS.glob("llama_cpp_python-*.whl")):
        pytest.skip(f"{WHEELS}: no wheel of llama-cpp-python kept; run: make setup")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the sources, as in a fresh clone."""
    copy = tmp_path / "checkout"
    built = shutil.ignore_patterns("lib", "__pycache__", "*.egg-info")
    for name in ("native", "patches", "rotary_llamacpp"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    shutil.rmtree(copy / "rotary_llamacpp" / "include", ignore_errors=True)
    files = "setup.py pyproject.toml CMakeLists.txt MANIFEST.in README.md LICENSE CHANGELOG.md"
    for name in files.split():
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def environment(tmp_path) -> Path:
    """An environment with nothing but pip."""
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def dist(index, tmp_path_factory) -> Path:
    """A source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", ROOT, "--sdist", "-o", folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    run(sys.executable, "-m", "build", folder / sdist.name.removesuffix(".tar.gz"), "--wheel", "-o", folder)
    return folder


def pip_install(environment: Path, what: Path) -> None:
    links = f"{os.environ.get('PIP_FIND_LINKS', '')} {WHEELS}".strip()
    run(environment / "python", "-m", "pip", "install", what, PIP_FIND_LINKS=links)


def assert_it_pages(environment: Path, model: Path) -> None:
    ran = run(environment / "rotary", "run", model, "-p", "In", "-n", 4, "--budget", "25%", "--temp", 0)
    assert "8 of 32 slots per layer" in ran.stderr + ran.stdout
    where = run(environment / "rotary", "backend-path").stdout.strip()
    assert Path(where).is_file() and Path(where).is_relative_to(environment.parent)
    package = Path(where).parent.parent
    assert (package / "py.typed").is_file() and (package / "include" / "rotary.h").is_file()


@pytest.mark.model
def test_a_checkout_by_pip(index, checkout, environment, tiny_model):
    pip_install(environment, checkout)
    assert_it_pages(environment, tiny_model)


@pytest.mark.model
def test_a_checkout_by_uv(index, checkout, environment, tiny_model):
    python = environment / "python"
    uv = Path(sys.executable).with_name("uv")
    # Let uv trust the system's certificates, as pip does.
    run(uv, "pip", "install", "--python", python, checkout, UV_FIND_LINKS=str(WHEELS), UV_SYSTEM_CERTS="true")
    assert_it_pages(environment, tiny_model)


@pytest.mark.model
def test_a_wheel(dist, environment, tiny_model):
    (wheel,) = dist.glob("*.whl")
    pip_install(environment, wheel)
    assert_it_pages(environment, tiny_model)


@pytest.mark.model
def test_a_source_distribution(dist, environment, tiny_model):
    (sdist,) = dist.glob("*.tar.gz")
    pip_install(environment, sdist)
    assert_it_pages(environment, tiny_model)


def test_what_a_source_distribution_holds(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("native", "patches", "rotary_llamacpp")
        for path in (ROOT / folder).rglob("*.[!ps]*" if folder == "native" else "*")
        if path.is_file() and not {"__pycache__", "lib", "include"} & set(path.parts[len(ROOT.parts) + 1 :])
    }
    assert wanted <= held and {"CMakeLists.txt", "LICENSE", "native/include/rotary.h"} <= held


def test_what_a_wheel_needs_of_a_system(dist):
    """A wheel needs only libraries that every Linux has, and ggml, which the process has loaded."""
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert {"rotary_llamacpp/lib/libggml-rotary.so", "rotary_llamacpp/py.typed"} <= set(held.namelist())
    said = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).stdout.split())
    assert 'This constrains the platform tag to "manylinux_' in said, said
    libraries = set(re.findall(r"(lib[\w+-]+)\.so", said))
    assert libraries <= {"libc", "libm", "libstdc++", "libgcc_s", "libpthread", "libdl", "librt"}, libraries


# ---- what is refused, in one line and before anything is built


def refused(checkout: Path, program: str, **environment: str) -> str:
    """Run `program`, which runs setup.py and must fail; returns the last line on stderr."""
    ran = run(
        *(sys.executable, "-c", f"import os, sys; os.chdir({str(checkout)!r}); {program}"),
        check=False,
        **environment,
    )
    assert ran.returncode != 0 and "Traceback" not in ran.stderr, ran.stderr
    return ran.stderr.strip().splitlines()[-1]


LOADED = "import setuptools.command.bdist_wheel, setuptools.command.build_ext"  # before sys.platform changes
SETUP = "import runpy; sys.argv = ['setup.py', {command!r}]; runpy.run_path('setup.py', run_name='__main__')"


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_other_systems_are_refused(checkout, platform):
    said = refused(checkout, f"{LOADED}; sys.platform = {platform!r}; " + SETUP.format(command="egg_info"))
    assert platform in said and "Linux" in said


def test_a_download_that_is_another_file(checkout):
    archive = checkout / "build" / "sdist" / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not it")
    said = refused(checkout, SETUP.format(command="llama_cpp"))
    assert pinned.LLAMA_CPP_PYTHON_SHA256 in said and str(archive) in said


def test_no_index(checkout, tmp_path):
    nowhere = tmp_path.as_uri()
    said = refused(
        checkout, SETUP.format(command="llama_cpp"),
        PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL=nowhere, PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="",
    )  # fmt: skip
    assert "pip could not download" in said and "ROTARY_LLAMA_CPP_DIR" in said
