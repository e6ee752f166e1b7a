# SPDX-License-Identifier: MIT
"""The command line: every command, its JSON, and one line with exit 2 for every kind of bad input."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from rotary_llamacpp.cli import main
from rotary_llamacpp.gguf_files.info import ModelInfo
from rotary_llamacpp.host import machine
from rotary_llamacpp.runtime.generation import Watcher, load
from tests.support import HANG_S, ROOT

QUICK = ("--temp", "0", "--threads", "1")


def test_every_command_is_documented_with_an_example():
    readme = (ROOT / "README.md").read_text()
    assert set(main.commands) == {
        "run",
        "info",
        "plan",
        "trace",
        "profile",
        "simulate",
        "convert",
        "report",
        "doctor",
        "backend-path",
    }
    for name, command in main.commands.items():
        assert f"rotary {name}" in readme, name
        assert command.help and f"rotary {name}" in command.epilog, name
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help, f"{name} {parameter.name}"


def test_help(rotary_command):
    for command in ((), *([name] for name in main.commands)):
        ran = rotary_command(*command, "--help")
        assert ran.returncode == 0 and "Usage:" in ran.stdout
        assert not command or "Example:" in ran.stdout


def test_the_version_takes_no_heavy_import():
    code = """if True:
        import sys
        from rotary_llamacpp.__main__ import main
        sys.argv[1:] = ["--version"]
        try:
            main()
        finally:
            print({"numpy", "gguf", "llama_cpp", "cffi"} & sys.modules.keys(), file=sys.stderr)
    """
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "version" in ran.stdout and ran.stderr == "set()\n"


def test_options_of_the_store_are_in_the_help(rotary_command):
    said = rotary_command("run", "--help").stdout
    for part in ("--store [auto|mmap|direct]", "--no-prefetch", "--staging SIZE", "--no-progress"):
        assert part in said


def test_run(native, tiny_model, rotary_command):
    ran = rotary_command("run", tiny_model, "-p", "In the beginning", "-n", 8, "--budget", "25%", *QUICK)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() and ran.stdout.endswith("\n")
    announced, figures = ran.stderr.splitlines()
    assert "8 of 32 slots per layer" in announced
    assert "8 tokens at" in figures and "hit rate" in figures
    off = rotary_command("run", tiny_model, "-p", "In the beginning", "-n", 8, "--budget", "0", *QUICK)
    assert off.stdout == ran.stdout
    assert "rotary is off" in off.stderr


def test_threads_are_of_the_cpus_that_may_be_used(native, tiny_model, monkeypatch):
    monkeypatch.setattr(machine, "cpu_count", lambda: 3)
    for given, expected in (({}, (1, 3)), ({"n_threads": None, "n_threads_batch": 2}, (1, 2))):
        llama = load(str(tiny_model), None, n_ctx=32, **given)
        assert (llama.n_threads, llama.n_threads_batch) == expected
        llama.close()


def test_run_json(native, tiny_model, rotary_command):
    ran = rotary_command(
        "run", tiny_model, "-p", "In the beginning", "-n", 8, "--budget", "min", "--json", *QUICK
    )
    assert ran.returncode == 0 and ran.stderr == ""
    found = json.loads(ran.stdout)
    assert set(found) >= {
        "text", "prompt_tokens", "completion_tokens", "tokens_per_second", "prompt_tokens_per_second",
        "hit_rate", "bytes_paged", "n_slots", "budget_bytes", "inner_device",
    }  # fmt: skip
    assert found["completion_tokens"] == 8 and found["prompt_tokens"] > 1 and found["text"]
    assert found["tokens_per_second"] > 0 and found["prompt_tokens_per_second"] > 0
    assert 0 < found["hit_rate"] < 1 and found["bytes_paged"] > 0
    assert found["n_slots"] == 4 and found["inner_device"] == "CPU" and found["interrupted"] is False
    # Each token uses 4 experts in each of 6 layers. The last generated token is not decoded, and the last
    # layer computes only the positions whose logits are wanted.
    n_decoded = found["prompt_tokens"] + found["completion_tokens"] - 1
    assert found["requests"] == 4 * (5 * n_decoded + found["completion_tokens"])


def test_seed_repeats_sampling(native, tiny_model, rotary_command):
    def sampled(seed):
        arguments = ("-p", "In the", "-n", 12, "--temp", "1.5", "--threads", "1", "--budget", "min")
        return rotary_command("run", tiny_model, *arguments, "--seed", seed).stdout

    first, again, other = sampled(7), sampled(7), sampled(8)
    assert first == again != other


def test_run_options_reach_the_model(native, tiny_model, rotary_command):
    arguments = ("--no-mmap", "--no-repack", "--no-direct", "--inner", "CPU", "--ctx", "64")
    ran = rotary_command("run", tiny_model, "-p", "In", "-n", 100, *arguments, "--budget", "16 slots", *QUICK)
    assert ran.returncode == 0, ran.stderr
    assert "store memory" in ran.stderr and "16 of 32 slots" in ran.stderr
    n_tokens = int(ran.stderr.splitlines()[-1].split()[1])
    assert n_tokens < 64, "generation stops at the end of the context"


def test_run_with_direct_reads(native, tiny_model, rotary_command):
    arguments = ("run", tiny_model, "-p", "In the beginning", "-n", 8, "--budget", "25%", *QUICK)
    mapped = rotary_command(*arguments, "--store", "mmap")
    assert "MiB/s" not in mapped.stderr
    for options in ((), ("--no-prefetch", "--staging", "4MiB")):
        ran = rotary_command(*arguments, "--store", "direct", *options)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout == mapped.stdout
        announced, figures = ran.stderr.splitlines()
        assert "store direct" in announced
        assert "store direct; " in figures and "MiB/s from disk" in figures
        assert ("no prefetch" in figures) == bool(options)
    found = json.loads(rotary_command(*arguments, "--store", "direct", "--json").stdout)
    assert found["store"] == "direct" and found["io"] in ("uring", "threads") and found["bytes_read"] > 0


def test_dense_model_runs_and_says_paging_does_not_apply(dense_model, rotary_command):
    ran = rotary_command("run", dense_model, "-p", "abc", "-n", 4, *QUICK)
    assert ran.returncode == 0
    assert "paging does not apply" in ran.stderr.splitlines()[0]


def test_zero_tokens(native, tiny_model, rotary_command):
    ran = rotary_command("run", tiny_model, "-p", "In", "-n", 0, "--budget", "min", "--json", *QUICK)
    found = json.loads(ran.stdout)
    assert (found["text"], found["completion_tokens"], found["hit_rate"]) == ("", 0, None)


def test_interrupting_prints_the_figures(native, synthetic):
    model = synthetic(layers=16, type="q8_0", vocab=4096)
    command = [sys.executable, "-m", "rotary_llamacpp", "run", str(model), "-p", "abc", "-n", "4000"]
    running = subprocess.Popen(  # greedily: random sampling would sometimes end the text early
        [*command, "--temp", "0", "--budget", "min", "--threads", "1"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    first = os.read(running.stdout.fileno(), 1)  # streaming has begun
    running.send_signal(signal.SIGINT)
    rest, errors = running.communicate(timeout=HANG_S)
    assert running.returncode == 130
    assert first and rest.endswith(b"\n")
    assert b"Traceback" not in errors and b"tok/s" in errors.splitlines()[-1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupting_the_load_stops_it(tiny_model):
    class Impatient(Watcher):
        def loading(self, fraction):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        load(str(tiny_model), None, watcher=Impatient())


# ---- info, doctor, backend-path


def test_info(tiny_model, rotary_command):
    ran = rotary_command("info", tiny_model, ROTARY_LIBRARY="/no/such.so")
    assert ran.returncode == 0
    for part in ("qwen3moe", "32 experts, 4 used", "minimum budget", "stay resident", "per layer"):
        assert part in ran.stdout
    plain = json.loads(rotary_command("info", tiny_model, "--json").stdout)
    assert plain == json.loads(json.dumps(ModelInfo.read(tiny_model).to_dict()))


def test_doctor(native, rotary_command):
    ran = rotary_command("doctor")
    assert ran.returncode == 0, ran.stdout
    assert all(line.split()[0] in ("ok", "warn") for line in ran.stdout.splitlines())
    checks = json.loads(rotary_command("doctor", "--json").stdout)
    assert {"name", "verdict", "detail", "advice"} == set(checks[0])
    assert len(checks) == len(ran.stdout.splitlines())


def test_doctor_fails(rotary_command):
    ran = rotary_command("doctor", ROTARY_LIBRARY="/no/such.so")
    assert ran.returncode == 1
    assert "FAIL" in ran.stdout and "pip install" in ran.stdout and ran.stderr == ""


def test_backend_path(native, rotary_command):
    ran = rotary_command("backend-path")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, str(native.path), "")


# ---- bad input


@pytest.fixture
def refusal(rotary_command):
    """Run a command that must be refused; returns the only line of its message."""

    def run(*arguments, **environment):
        ran = rotary_command(*arguments, **environment)
        assert ran.returncode == 2, ran
        assert ran.stdout == ""
        assert ran.stderr.count("\n") == 1 and ran.stderr.endswith("\n"), ran.stderr
        assert "Traceback" not in ran.stderr
        return ran.stderr

    return run


def test_bad_files(tiny_model, synthetic, tmp_path, refusal):
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(tiny_model.read_bytes()[:-1000])
    text = tmp_path / "text.gguf"
    text.write_text("not a model, but long enough to be read")
    shard = tmp_path / "lonely-00001-of-00003.gguf"
    shard.write_bytes(synthetic(type="q8_0", shards=3).read_bytes())
    expected = {
        tmp_path / "missing.gguf": "no such file",
        truncated: "truncated",
        text: "not a GGUF",
        tmp_path: "cannot be read",
        shard: "00002-of-00003",
    }
    for path, reason in expected.items():
        assert reason in refusal("info", path)
        assert reason in refusal("run", path, "-p", "x")


def test_budget_below_one_token_names_the_minimum(native, tiny_model, refusal):
    for budget in ("1%", "1MiB", "3 slots"):
        text = refusal("run", tiny_model, "-p", "x", "--budget", budget)
        assert f"budget {budget} is" in text and 'use "min", "4 slots" or 3MiB' in text


@pytest.mark.parametrize("budget", ["lots", "-1", "150%", "8XiB", ""])
def test_nonsense_budget(tiny_model, refusal, budget):
    assert "budget" in refusal("run", tiny_model, "-p", "x", f"--budget={budget}")


@pytest.mark.parametrize(("option", "value"), [("store", "disk"), ("store", ""), ("staging", "much")])
def test_nonsense_store(tiny_model, refusal, option, value):
    said = refusal("run", tiny_model, "-p", "x", f"--{option}", value)
    assert repr(value) in said and said.count("; ") >= 1


@pytest.mark.parametrize("name", ["BUDGET", "MARGIN", "STAGING", "RAM", "STORE", "PIN"])
def test_nonsense_in_the_environment(native, tiny_model, rotary_command, monkeypatch, name):
    monkeypatch.setenv(f"ROTARY_{name}", "plenty")
    ran = rotary_command("run", tiny_model, "-p", "x")
    said = ran.stderr.splitlines()[-1]
    assert ran.returncode == 2 and f"ROTARY_{name}" in said and "plenty" in said and said.count("; ") == 2


def test_unknown_inner_device(native, tiny_model, refusal):
    said = refusal("run", tiny_model, "-p", "x", "--inner", "NOSUCH0")
    assert "NOSUCH0" in said and "CPU" in said


def test_prompt_longer_than_the_context(native, tiny_model, rotary_command):
    ran = rotary_command("run", tiny_model, "-p", "word " * 200, "--ctx", "32", "--budget", "min")
    assert ran.returncode == 2 and "the context holds" in ran.stderr.splitlines()[-1]


def test_llama_cpp_of_another_version(native, tiny_model, tmp_path, refusal):
    info = tmp_path / "llama_cpp_python-0.3.99.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.99\n")
    said = refusal("run", tiny_model, "-p", "x", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "0.3.99" in said and "0.3.36" in said


def test_library_for_another_cpu(native, tiny_model, tmp_path, refusal):
    other = tmp_path / "libggml-rotary.so"
    data = bytearray(native.path.read_bytes())
    data[18:20] = {"x86_64": 183}.get(platform.machine(), 62).to_bytes(2, "little")
    other.write_bytes(data)
    assert "this Python is" in refusal("run", tiny_model, "-p", "x", ROTARY_LIBRARY=str(other))


def test_missing_library(tiny_model, refusal):
    assert "/no/such.so" in refusal("run", tiny_model, "-p", "x", ROTARY_LIBRARY="/no/such.so")
    assert "/no/such.so" in refusal("backend-path", ROTARY_LIBRARY="/no/such.so")


def test_a_model_llama_cpp_refuses(synthetic, tmp_path, refusal):
    model = tmp_path / "odd.gguf"
    model.write_bytes(synthetic(type="q8_0").read_bytes().replace(b"qwen3moe", b"qwen9moe"))
    assert "llama.cpp refuses it" in refusal("run", model, "-p", "x", "--budget", "0")
