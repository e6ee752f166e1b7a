# SPDX-License-Identifier: MIT
"""Routing traces: recording, writing, reading; replays compared with the run, by hand and by brute force."""

from __future__ import annotations

import itertools
import json
import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from rotary_llamacpp import Llama, RotaryConfig, policies, simulation, traces
from rotary_llamacpp.cli import main
from rotary_llamacpp.display.report import report
from rotary_llamacpp.errors import ReadError, RotaryError
from rotary_llamacpp.host.files import check_writable
from rotary_llamacpp.predictors import NAMES, PrefetchPolicy
from rotary_llamacpp.runtime.recording import record
from rotary_llamacpp.units import parse_rate
from tests.support.routings import made

CONFIG = {"budget": "25%", "verbose": False}


@pytest.fixture(scope="module")
def recorded(native, tiny_model):
    config = RotaryConfig(**CONFIG)
    return record(str(tiny_model), ["In the beginning", "The whale"], 20, config, temp=0, seed=1, n_ctx=256)


# ---- recording


@pytest.mark.model
def test_recorded(recorded):
    assert recorded.n_expert == 32 and recorded.layers == list(range(6))
    assert sorted(set(recorded.sequence)) == [0, 1] and recorded.tokens(traces.DECODE) == 40
    for sequence in (0, 1):
        rows = recorded.sequence == sequence
        n_prompt = int(recorded.step[rows & (recorded.phase == traces.PREFILL)].max()) + 1
        decoded = recorded.step[rows & (recorded.phase == traces.DECODE)]
        assert sorted(set(decoded)) == list(range(n_prompt, n_prompt + 20))
        last = rows & (recorded.phase == traces.PREFILL) & (recorded.layer == 5)
        assert recorded.step[last].tolist() == [n_prompt - 1], "the last layer computes the last token alone"
    assert len(recorded.experts) == recorded.tokens() * 6 - (recorded.tokens(traces.PREFILL) - 2)
    assert all(len(set(each)) == 4 for each in recorded.experts), "four different experts each"
    weights = recorded.weights
    assert ((weights > 0) & (weights < 1)).all() and (weights[:, 0] >= weights[:, 3]).all()
    assert 0 < recorded.resident.mean() < 1


@pytest.mark.model
@pytest.mark.parametrize("policy", ["lru", "lfu", "s3fifo", "arc", "recall"])
@pytest.mark.parametrize("split", ["adaptive", "even"])
def test_the_replay_is_the_run(native, tiny_model, policy, split):
    # The prompt is one token, so that every lookup is for one token, in the run as in the replay.
    config = RotaryConfig(**CONFIG, policy=policy, split=split)
    found = record(str(tiny_model), [""], 60, config, temp=0.8, seed=3, n_ctx=256)
    slots = simulation.slots_for(found, 0.25)
    replayed = simulation.replay(found, policy, slots, adaptive=split == "adaptive")
    there = found.resident[found.phase == traces.DECODE]
    assert replayed.requests == there.size == 60 * 6 * 4
    assert replayed.misses == (~there).sum() > 0


@pytest.mark.model
@pytest.mark.parametrize("budget", ["25%", "100%"])
def test_recording_changes_nothing(tiny_model, exact, monkeypatch, budget):
    from rotary_llamacpp.runtime import paging

    start = paging.Paging.start

    def start_and_trace(self, llama, config):
        start(self, llama, config)
        self.pools.trace(True)

    monkeypatch.setattr(paging.Paging, "start", start_and_trace)
    stats = exact(tiny_model, 60, {"budget": budget, "repack": False}, n_ubatch=16)
    assert stats["waits"] >= stats["lookups"] > 0


def fails_at(monkeypatch, n, error):
    """Make the model's n-th evaluation raise `error`."""
    evaluate, calls = Llama.eval, itertools.count(1)

    def failing(self, tokens):
        if next(calls) == n:
            raise error
        evaluate(self, tokens)

    monkeypatch.setattr(Llama, "eval", failing)


def test_all_prompts_are_checked_before_one_is_computed(native, tiny_model, monkeypatch):
    fails_at(monkeypatch, 1, AssertionError("computed"))
    config = RotaryConfig(**CONFIG)
    with pytest.raises(RotaryError, match=r"prompt 2: 1?\d\d\d? tokens and 5 more; the context holds 64"):
        record(str(tiny_model), ["The whale", "whale " * 100, "The"], 5, config, n_ctx=64)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(), ReadError("x.gguf: gone; it was there; mend it"), MemoryError(),
        RuntimeError("llama_decode returned 1"),
    ],
)  # fmt: skip
def test_what_was_recorded_is_kept_when_a_later_prompt_fails(native, tiny_model, monkeypatch, error):
    # A prompt takes three graphs, one for its tokens and two for decode: the second prompt's last one fails.
    fails_at(monkeypatch, 6, error)
    found = record(str(tiny_model), ["The whale", "The", "In"], 2, RotaryConfig(**CONFIG), temp=0, n_ctx=64)
    assert set(found.sequence) == {0, 1} and found.about["prompts"] == 2
    assert found.tokens(traces.DECODE) == 3
    if isinstance(error, KeyboardInterrupt):
        assert found.about["interrupted"] is True and "failed" not in found.about
    else:
        assert found.about["failed"].startswith("prompt 2: ") and str(error) in found.about["failed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ReadError("x.gguf: gone; it was there; mend it")])
def test_a_recording_that_fails_at_once_raises(native, tiny_model, monkeypatch, error):
    fails_at(monkeypatch, 1, error)
    with pytest.raises(type(error)):
        record(str(tiny_model), ["The whale"], 2, RotaryConfig(**CONFIG), n_ctx=64)


def test_the_command_writes_what_was_recorded(native, tiny_model, tmp_path, monkeypatch, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "a.trace"
    prompts.write_text("The whale\nThe\nIn\n")
    files = [str(tiny_model), "--prompts", str(prompts), "-o", str(out)]
    for error, status, says in (
        (ReadError("x.gguf: gone; it was there; mend it"), 2, "prompt 2: x.gguf: gone"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        with monkeypatch.context() as patched:
            fails_at(patched, 6, error)
            with pytest.raises(SystemExit) as ended:
                main(["trace", *files, "-n", "2", "--ctx", "64", "--temp", "0"])
        said = capsys.readouterr()
        assert ended.value.code == status
        last = said.err.splitlines()[-1]
        assert last.startswith("rotary: ") and says in last and f"2 of 3 prompts are in {out}" in last
        assert traces.load(out).tokens(traces.DECODE) == 3
        out.unlink()


def test_where_a_trace_goes_is_tried_first(native, tiny_model, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The whale\n")
    fails_at(monkeypatch, 1, AssertionError("computed"))
    for out in (tmp_path, tmp_path / "none" / "a.trace"):
        with pytest.raises(SystemExit) as ended:
            main(["trace", str(tiny_model), "--prompts", str(prompts), "-o", str(out)])
        assert ended.value.code == 2 and f"rotary: {out}: cannot be written" in capsys.readouterr().err
    kept = tmp_path / "kept.trace"
    kept.write_text("an older trace")
    check_writable(kept)
    assert kept.read_text() == "an older trace" and sorted(tmp_path.iterdir()) == [kept, prompts]


@pytest.mark.model
def test_from_the_command_line(tiny_model, tmp_path, rotary_command):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "a.trace"
    prompts.write_text("In the beginning\n\nThe whale\n")
    ran = rotary_command("trace", tiny_model, "--prompts", prompts, "-o", out, "-n", "5", "--seed", "1")
    assert ran.returncode == 0 and "in 6 layers, 4 of 32 experts each" in ran.stdout, ran.stderr
    ran = rotary_command("simulate", out, "--budgets", "25", "--policies", "lru,recall", "--json")
    rows = json.loads(ran.stdout)
    assert [row["policy"] for row in rows] == ["lru", "recall", "belady"] and rows[0]["n_slots"] == 8
    ran = rotary_command("simulate", out, "--link", "1GB/s", "--budgets", "25,50", "--predictors", "similar")
    assert ran.returncode == 0 and len(ran.stdout.splitlines()) == 1 + 2 * (len(policies.NATIVE) + 1)

    prompts.write_text("\n")
    refused = {
        ("trace", tiny_model, "--prompts", prompts, "-o", out): "has no prompt",
        ("trace", tiny_model, "--prompts", tmp_path / "none", "-o", out): "cannot be read",
        ("simulate", prompts): "not a routing trace",
        ("simulate", tmp_path / "none"): "cannot be read",
        ("simulate", out, "--policies", "mru"): "policy 'mru': not known",
        ("simulate", out, "--budgets", "0"): "not percentages",
        ("simulate", out, "--link", "fast"): "not a rate",
        ("simulate", out, "--predictors", "similar"): "give --link",
    }
    for command, said in refused.items():
        ran = rotary_command(*command)
        assert ran.returncode == 2 and said in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


@pytest.mark.model
def test_report(recorded, tmp_path, rotary_command):
    recorded.save(tmp_path / "a.trace")
    out = tmp_path / "report.html"
    ran = rotary_command("report", tmp_path / "a.trace", "-o", out, "--budgets", "25,50", "--link", "1GB/s")
    assert ran.returncode == 0, ran.stderr
    page = out.read_text()
    root = ElementTree.fromstring(page.replace("<!doctype html>", ""))
    assert [each.text for each in root.iter("h2")][:2] == ["Which experts are chosen", "Policies by budget"]
    assert "http" not in page and "<script" not in page and "src=" not in page
    assert all(link[0] in "#d" for link in re.findall(r'href="([^"]+)', page)), "nothing from elsewhere"
    rows = [[cell.text for cell in row] for row in root.iter("tr")]
    assert [row[0] for row in rows] == ["prefetch", "none", *NAMES]
    svgs = list(root.iter("svg"))
    words = [[each.text for each in svg.iter("text")] for svg in svgs]
    assert len(svgs) == 4 and "layer" in words[0]
    assert {"lru", "lfu", "recall", "belady"} <= set(words[1]) and "belady" not in words[2]
    assert {"none", *NAMES} <= set(words[3])
    ran = rotary_command("report", tmp_path / "a.trace", "-o", tmp_path / "no" / "x.html", "--budgets", "50")
    assert ran.returncode == 2 and "cannot be written" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.trace", "report.html"]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_report_without_the_extra(recorded, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    link = simulation.Link(1000, 3000)
    with pytest.raises(RotaryError, match=rf"^{package}: .*pip install 'rotary-llamacpp\[report\]'`$"):
        report(recorded, ["lru"], [0.25], link, ["previous"])


# ---- files


@pytest.mark.parametrize("name", ["a.trace", "a.csv"])
def test_written_and_read(recorded, tmp_path, name):
    recorded.save(tmp_path / name)
    again = traces.load(tmp_path / name)
    for array in ("sequence", "phase", "step", "layer", "experts", "resident"):
        assert (getattr(again, array) == getattr(recorded, array)).all(), array
    assert np.allclose(again.weights, recorded.weights, rtol=1e-5)
    assert (again.n_expert, again.expert_bytes) == (recorded.n_expert, recorded.expert_bytes)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_damaged_files(recorded, tmp_path):
    recorded.save(tmp_path / "good")
    whole = (tmp_path / "good").read_bytes()
    rng = np.random.default_rng(0)
    for number in range(40):
        damaged = bytearray(whole[: int(rng.integers(len(whole)))] if number % 2 else whole)
        for at in rng.integers(0, max(len(damaged), 1), 20):
            damaged[at : at + 1] = bytes([int(rng.integers(256))]) if damaged else b""
        (tmp_path / "bad").write_bytes(damaged)
        try:
            found = traces.load(tmp_path / "bad")
        except RotaryError as error:
            assert str(error).count("; ") >= 1
        else:
            assert found.experts.max() < found.n_expert


def wrong_arrays():
    """Functions that spoil an archive's arrays, with the name of the damage."""
    yield "complex experts", lambda arrays: arrays.update(experts=arrays["experts"].astype(complex))
    yield "dates", lambda arrays: arrays.update(sequence=arrays["sequence"].astype("M8[s]"))
    yield "layers in rows", lambda arrays: arrays.update(layer=arrays["layer"][:, None])
    yield "a number too large", lambda arrays: arrays.update(step=arrays["step"].astype(np.int64) + 2**32)
    yield "weights that are integers", lambda arrays: arrays.update(weights=arrays["weights"].astype(int))
    yield "resident bits that are floats", lambda arrays: arrays.update(resident=arrays["resident"] / 1)
    yield "two experts used of one", lambda arrays: change_meta(arrays, n_expert=1)
    yield "more experts than there are", lambda arrays: change_meta(arrays, n_expert=2**40)
    yield "tables of pairs of terabytes", lambda arrays: change_meta(arrays, n_expert=60000)
    yield "a list about it", lambda arrays: change_meta(arrays, about=[1])
    yield "sizes below nothing", lambda arrays: change_meta(arrays, expert_bytes={"0": -1})


def change_meta(arrays, **changes):
    found = json.loads(arrays["meta"].tobytes()) | changes
    arrays["meta"] = np.frombuffer(json.dumps(found).encode(), np.uint8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("what", "spoil"), [pytest.param(*each, id=each[0]) for each in wrong_arrays()])
def test_archives_of_something_else(tmp_path, what, spoil):
    arrays = made([[[0, 0]]])._archive()
    spoil(arrays)
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(RotaryError, match="not a routing trace"):
        traces.load(tmp_path / "bad.npz")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "text",
    [
        "", "a,b,c\n", "0,0,0,0,0,5,x,0,1\n", "0,0,0,0,-1,5,0.5,0,1\n", "0,2,0,0,0,5,0.5,0,1\n",
        "nan,0,0,0,0,5,0.5,0,1\n", "0,0,0,0,inf,5,0.5,0,1\n", "0,0,0,0,0,1e300,0.5,0,1\n",
        "0,0,0,0,0,5,0.5,0,1e30\n", "0,0,0,0.5,0,5,0.5,0,1\n", "# n_expert=1e9\n0,0,0,0,0,5,0.5,0,1\n",
    ],
)  # fmt: skip
def test_no_trace(tmp_path, text):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(RotaryError, match="not a routing trace"):
        traces.load(tmp_path / "bad.csv")


def test_real_csv(shared_trace):
    found = shared_trace("qwen")
    assert (found.n_expert, len(found.layers), found.tokens(traces.DECODE)) == (128, 48, 128)
    assert found.expert_bytes[0] == 3059712


# ---- replays


def test_belady_is_the_best(native):
    # Compared with all sequences of choices: 4 experts, 2 slots; an expert may leave right after its use.
    rng = np.random.default_rng(1)
    for _ in range(20):
        requests = rng.integers(0, 4, 9).tolist()
        trace = made([[[expert]] for expert in requests])
        kept = {frozenset(): 0}
        for expert in requests:
            after = {}
            for there, misses in kept.items():
                missed = misses + (expert not in there)
                for leaving in (None, *there, expert):
                    now = (there | {expert}) - {leaving}
                    if len(now) <= 2:
                        after[now] = min(after.get(now, 99), missed)
            kept = after
        fewest = min(kept.values())
        assert simulation.belady(trace, [2]).misses == fewest
        for policy in policies.NATIVE:
            assert simulation.replay(trace, policy, [2]).misses >= fewest


class Knows(PrefetchPolicy):
    """A predictor that always names expert 1."""

    def name(self, layer, ahead, n):
        return [1]


def test_time_by_hand(native):
    # Two layers with experts of 1000 and 2000 bytes, a link of 10 bytes/us, 50 us to compute each layer.
    # Token 1: layer 0 waits 100 + 5, computes 50; layer 1 waits 200 + 5, computes 50: 410 us, 310 of waiting.
    # With expert 1 named for layer 1, 500 bytes arrive meanwhile: it waits 150 + 5. Token 2 does not wait.
    trace = made([[[0], [1]], [[0], [1]]], sizes=(1000, 2000))
    link = simulation.Link(bytes_per_us=10, compute_us=100, latency_us=5)
    plain = simulation.replay(trace, "lru", [2, 2], link)
    assert (plain.time_us, plain.stall_us) == (410 + 100, 310)
    assert (plain.requests, plain.misses, plain.tokens, plain.n_bytes) == (4, 2, 2, 3000)
    ahead = simulation.replay(trace, "lru", [2, 2], link, simulation.predictor(trace, Knows))
    assert (ahead.time_us, ahead.stall_us) == (360 + 100, 260)
    assert (ahead.prefetched, ahead.prefetch_used, ahead.late_hits, ahead.n_bytes) == (1, 1, 1, 3000)
    assert ahead.byte_hit_rate == 1 - 2500 / 6000 and ahead.tokens_per_second == 1e6 * 2 / 460
    quick = simulation.Link(bytes_per_us=100, compute_us=100)
    found = simulation.replay(trace, "lru", [2, 2], quick, simulation.predictor(trace, Knows))
    assert (found.time_us, found.misses, found.late_hits) == (110 + 100, 1, 0), "it came in time"


@pytest.mark.parametrize("name", NAMES)
def test_predictors(native, recorded, name):
    link = simulation.Link(2000, 1000)
    slots = simulation.slots_for(recorded, 0.25)
    none = simulation.replay(recorded, "recall", slots, link)
    found = simulation.replay(recorded, "recall", slots, link, simulation.predictor(recorded, name), depth=2)
    assert found.requests == none.requests and found.late_hits <= found.prefetch_used <= found.prefetched
    assert none.byte_hit_rate == pytest.approx(none.hit_rate)
    assert found.tokens_per_second > 0.97 * none.tokens_per_second
    if name in ("similar", "mixed", "router", "transition"):
        assert found.prefetch_used > 0 and found.stall_us < none.stall_us


@pytest.mark.parametrize(
    ("text", "rate"), [("25GB/s", 25000), ("500MiB/s", 524.288), ("pcie4x16", 25000), ("1.5KB/s", 0.0015)]
)
def test_rates(text, rate):
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "25", "GB/s", "-1GB/s", "0MB/s", "nanGB/s", "25GB", "pcie9"])
def test_no_rates(text):
    with pytest.raises(RotaryError, match="not a rate"):
        parse_rate(text)
