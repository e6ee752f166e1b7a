# SPDX-License-Identifier: MIT
"""The command in a broken environment: llama_cpp cannot be imported, Ctrl-C comes during start-up, outputs
are closed or full, files are not what they should be. Each ends in one line, never in a traceback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rotary_llamacpp import pinned
from rotary_llamacpp.__main__ import main as start
from tests.support import ROOT
from tests.support.processes import python

# Modules that come first on the path: a llama_cpp that fails as broken installations do.
_BROKEN = {
    "a missing library": "raise RuntimeError(\"Failed to load shared library '/x/libllama.so': libgomp.so.1: "
    'cannot open shared object file: No such file or directory")',
    "a missing package": "import no_such_package_of_its_own",
    "an old numpy": r"raise ImportError('\n\nIMPORTANT: PLEASE READ THIS\n\nnumpy is broken\n')",
    "a missing symbol": "raise AttributeError('libllama.so: undefined symbol: llama_new')",
}


@pytest.fixture(params=[*_BROKEN, "another library", "no library", "no package"])
def broken(request, tmp_path):
    """Environment of a process whose llama_cpp cannot be imported, and a word that messages must contain."""
    folder = tmp_path / "broken"
    (folder / "llama_cpp").mkdir(parents=True)
    if request.param in _BROKEN:
        (folder / "llama_cpp" / "__init__.py").write_text(_BROKEN[request.param])
        word = {"a missing library": "libgomp.so.1", "a missing package": "no_such_package_of_its_own"}
        return {"PYTHONPATH": f"{folder}:{ROOT}"}, word.get(request.param, "llama_cpp")
    if request.param == "no package":
        (folder / "sitecustomize.py").write_text(
            "import sys\n"
            "class Hidden:\n"
            "    def find_spec(self, name, *_):\n"
            "        if name == 'llama_cpp':\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Hidden())\n"
        )
        return {"PYTHONPATH": f"{folder}:{ROOT}"}, "No module named"
    if request.param == "another library":  # loads, but has no function of llama.cpp
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("no C compiler")
        library = folder / "libllama.so"
        subprocess.run([compiler, "-shared", "-x", "c", "/dev/null", "-o", library], check=True)
    return {"LLAMA_CPP_LIB_PATH": str(folder)}, "LLAMA_CPP_LIB_PATH"


def assert_one_line(ran, status=2):
    assert ran.returncode == status, ran
    assert "Traceback" not in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr


def test_commands_say_in_one_line_why_llama_cpp_cannot_be_imported(
    broken, tiny_model, tmp_path, rotary_command
):
    environment, word = broken
    prompts = tmp_path / "prompts"
    prompts.write_text("abc\n")
    for command in (
        ("run", tiny_model, "-p", "x"),
        ("trace", tiny_model, "--prompts", prompts, "-o", tmp_path / "a.trace"),
        ("plan", tiny_model, "--measure"),
    ):
        ran = rotary_command(*command, **environment)
        assert_one_line(ran)
        assert word in ran.stderr and "llama_cpp" in ran.stderr and pinned.LLAMA_CPP_PYTHON in ran.stderr
        assert ran.stdout == "" and len(ran.stderr) < 700


def test_what_needs_no_llama_cpp_does_without(broken, rotary_command):
    environment, word = broken
    ran = rotary_command("plan", "gpt-oss-20b", "--ram", "64GiB", **environment)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    if word == "libgomp.so.1":
        ran = rotary_command("doctor", **environment)
        assert ran.returncode == 1 and ran.stderr == "" and "FAIL" in ran.stdout and word in ran.stdout


def test_the_package_raises_its_own_error_where_llama_cpp_cannot_be_imported(broken):
    environment, word = broken
    code = """
import rotary_llamacpp, sys
for name in ("Llama", "activate", "Llama"):
    try:
        getattr(rotary_llamacpp, name)
    except rotary_llamacpp.RotaryError as error:
        assert isinstance(error, RuntimeError), type(error)
        print(error)
"""
    said = python(code, **environment).stdout.splitlines()
    assert len(said) == 3 and len(set(said)) == 1 and word in said[0] and said[0].count("; ") >= 2


def test_a_missing_dependency_is_one_line(tmp_path, rotary_command):
    (tmp_path / "gguf.py").write_text("import no_such_package")
    ran = rotary_command("info", "x.gguf", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert_one_line(ran)
    assert "no_such_package" in ran.stderr and "install" in ran.stderr


# ---- Ctrl-C

_INTERRUPTED = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize(
    "module",
    [
        "click", "numpy.linalg", "gguf.constants", "rotary_llamacpp.cli", "rotary_llamacpp.config",
        "rotary_llamacpp.runtime.generation", "llama_cpp._ctypes_extensions", "llama_cpp.llama_chat_format",
        "rich.live", "cffi",
    ],
)  # fmt: skip
def test_interrupted_at_any_import(module, tiny_model, tmp_path, rotary_command):
    (tmp_path / "sitecustomize.py").write_text(_INTERRUPTED)
    ran = rotary_command(
        "run", tiny_model, "-p", "x", "-n", "1", PYTHONPATH=f"{tmp_path}:{ROOT}", INTERRUPT_AT=module
    )
    assert ran.returncode == 130 and ran.stdout == "", ran
    assert ran.stderr in ("", "rotary: interrupted\n")


def test_interrupts_that_are_ignored_stay_so(tiny_model, tmp_path, rotary_command):
    # As for a background process of a shell.
    (tmp_path / "sitecustomize.py").write_text(_INTERRUPTED + "signal.signal(signal.SIGINT, signal.SIG_IGN)")
    ran = rotary_command("info", tiny_model, PYTHONPATH=f"{tmp_path}:{ROOT}", INTERRUPT_AT="numpy")
    assert ran.returncode == 0 and ran.stderr == "" and "experts" in ran.stdout


def test_a_load_that_is_interrupted_ends_in_one_line(native, tiny_model, tmp_path, rotary_command):
    # The signal arrives in llama.cpp's progress callback, from which ctypes prints exceptions and drops them.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def profiler(frame, event, _):\n"
        "    if event == 'call' and frame.f_code.co_name == 'on_progress':\n"
        "        sys.setprofile(None)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.setprofile(profiler)\n"
    )
    for verbose in ((), ("--verbose",)):
        ran = rotary_command(
            "run", tiny_model, "-p", "x", "-n", "1", *verbose, PYTHONPATH=f"{tmp_path}:{ROOT}"
        )
        assert ran.returncode == 130 and "Traceback" not in ran.stderr, ran.stderr
        assert ran.stderr.splitlines()[-1] == "rotary: interrupted"
        assert verbose or ran.stderr.count("\n") == 1


# ---- outputs


@pytest.fixture
def shell(tiny_model):
    """Run a line in a shell in which $rotary and $model are set."""

    def run(line, **environment):
        rotary = f"{sys.executable} -m rotary_llamacpp"
        return subprocess.run(
            ["/bin/sh", "-c", line],
            env={
                **os.environ, "PYTHONPATH": str(ROOT), "rotary": rotary,
                "model": str(tiny_model), **environment
            },
            cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=120, check=False,
        )  # fmt: skip

    return run


COMMANDS = [
    "info $model --json", "plan gpt-oss-20b --vram 0 --ram 64GiB", "run $model -p x -n 2", "backend-path",
    "run --help",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_behind_the_output(native, shell, command):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    ran = shell(f"$rotary {command} > /dev/full")
    assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr, ran.stderr
    assert ran.returncode == 2 and "No space left on device" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_that_are_closed(native, shell, command):
    for end in ("2>&1 >&- | cat", "2>&1 | true", "2>&- | cat"):
        ran = shell(f"$rotary {command} {end}")
        said = ran.stdout + ran.stderr
        assert "Traceback" not in said and "Exception ignored" not in said, said


def test_names_that_are_no_text(native, tiny_model, tmp_path, shell):
    # File names are bytes: `info` reads a model named in Latin-1, though llama-cpp-python cannot load it.
    odd = os.fsencode(tmp_path) + b"/mod\xe8le.gguf"
    try:
        shutil.copy(tiny_model, odd)
    except OSError:
        pytest.skip("this file system accepts only names that are text")
    for command, language in (
        ("info {}", "C.UTF-8"), ("info {}", "C"), ("info {}x", "C.UTF-8"),
        ("convert --dry-run {} {}.out", "C"), ("convert {} {}.out", "C.UTF-8"),
    ):  # fmt: skip
        line = f"{sys.executable} -m rotary_llamacpp {command} --no-progress".replace("{}", '"$1"')
        ran = subprocess.run(
            [b"/bin/sh", b"-c", line.removesuffix("--no-progress" * command.startswith("info")), b"sh", odd],
            env={**os.environ, "LC_ALL": language, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip
        if command.startswith("convert {}"):
            os.unlink(odd + b".out")
        assert b"Traceback" not in ran.stdout + ran.stderr, (language, command, ran.stderr)
        assert ran.returncode == (2 if command == "info {}x" else 0), ran.stderr
    ran = shell(f'$rotary run "$(printf "{tmp_path}/mod\\350le.gguf")" -p x -n 1')
    assert_one_line(ran)
    assert "UTF-8" in ran.stderr and "rename" in ran.stderr


def test_text_that_the_terminal_has_no_letters_for(native, shell):
    ran = shell(
        '$rotary plan gpt-oss-20b --vram 0 --ram 64GiB --trace "/no/größe"',
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict",
    )  # fmt: skip
    assert_one_line(ran)


# ---- files


def test_a_name_with_a_line_break_is_one_line(rotary_command):
    assert_one_line(rotary_command("info", "no\nsuch.gguf"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process, where an unhandled exception fails the test."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rotary", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            start()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, ended.value.code or 0, said.out, said.err)

    return run


@pytest.mark.parametrize("kind", ["empty", "folder", "pipe", "zeros", "under a file", "secret"])
def test_files_that_are_none(native, tiny_model, tmp_path, command, kind):
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.write_text("abc\n")
    file = (
        Path("/dev/zero") if kind == "zeros" else prompts / "x" if kind == "under a file" else tmp_path / kind
    )
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind in ("empty", "secret"):
        file.touch(mode=0 if kind == "secret" else 0o666)
    if kind == "secret" and os.access(file, os.R_OK):
        pytest.skip("this user may read any file")
    for arguments in (
        ("info", file), ("run", file, "-p", "x"), ("plan", file), ("convert", file, out),
        ("trace", file, "--prompts", prompts, "-o", out),
        ("convert", tiny_model, out, "--imatrix", file, "--experts", "Q4_0", "--dry-run"),
        ("convert", tiny_model, out, "--profile", file, "--dry-run"),
        ("run", tiny_model, "-p", "x", "-n", "1", "--profile", file),
        ("plan", tiny_model, "--profile", file), ("plan", tiny_model, "--trace", file),
        ("profile", tiny_model, file), ("simulate", file), ("report", file, "-o", out),
        *([("trace", tiny_model, "--prompts", file, "-o", out)] if kind not in ("pipe", "zeros") else []),
    ):  # fmt: skip
        ran = command(*arguments)
        assert ran.returncode == 2 and "Traceback" not in ran.stderr + ran.stdout, (arguments, ran.stderr)
        assert "rotary: " in ran.stderr.splitlines()[-1]
    assert not out.exists()


def test_outputs_that_cannot_be_files(native, tiny_model, tmp_path, command):
    prompts = tmp_path / "prompts"
    prompts.write_text("abc\n")
    for file in (tmp_path, "/no/such/folder/file", prompts / "under"):
        for arguments in (
            ("trace", tiny_model, "--prompts", prompts, "-o", file, "-n", "1"),
            ("plan", "gpt-oss-20b", "--ram", "64GiB", "--plot", f"{file}/a.svg/"),
            *([("convert", tiny_model, file)] if file != tmp_path else []),
        ):
            ran = command(*arguments)
            assert ran.returncode == 2 and "Traceback" not in ran.stderr, (arguments, ran.stderr)
            assert "rotary: " in ran.stderr.splitlines()[-1]


# ---- numbers


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-1"])
def test_numbers_that_are_none(command, value):
    for arguments in (
        ("run", "x", "-p", "x", f"--temp={value}"),
        ("trace", "x", "--prompts", "x", "-o", "x", f"--temp={value}"),
        ("simulate", "x", f"--compute={value}"), ("simulate", "x", f"--latency={value}"),
        ("simulate", "x", f"--budgets={value}"), ("report", "x", "-o", "x", f"--compute={value}"),
        ("plan", "gpt-oss-20b", f"--link={value}GB/s"), ("plan", "gpt-oss-20b", f"--ram={value}"),
        ("plan", "gpt-oss-20b", f"--vram={value}GiB"), ("plan", "gpt-oss-20b", f"--budget={value}"),
    ):  # fmt: skip
        ran = command(*arguments)
        assert ran.returncode == 2 and "Traceback" not in ran.stderr, (arguments, ran.stderr)
        # click parses floats itself and prints the parsed value.
        said = rf"(?<![\w.-])({re.escape(value)}|{re.escape(str(float(value)))})(?![a-z])"
        assert re.search(said, ran.stderr), (arguments, ran.stderr)
