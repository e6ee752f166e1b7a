# SPDX-License-Identifier: MIT
"""Experts moved to a device while it computes, on a device without hardware: late_device.cpp.

The device computes with the CPU backend's kernels, so that logits are stock's bit for bit unless something
did not wait for its input: the device's streams run late, by random delays.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
from pathlib import Path

import pytest

from rotary_llamacpp import activate, deactivate, policies
from rotary_llamacpp.errors import DeviceError, ReadError
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.native import binding as _native
from tests.support.compiled import Disk
from tests.support.paged import assert_equal, attempt, load_late, make, notices, paged_trace, use_adapter
from tests.support.processes import ONE_ARENA, apart
from tests.support.tracing import prompt_tokens, trace

pytestmark = pytest.mark.model

LONG = 60
BATCHES = {"n_ubatch": 16}
CPU = {"use_extra_bufts": False, **BATCHES}


def run(model, configs, **options):
    """Logits and statistics of a run for each config, which may have an "environment"."""
    load_late()
    found = []
    for config in configs:
        config = {"inner": "LATE0", **config}
        environment = config.pop("environment", {})
        os.environ.update(environment)
        found.append(paged_trace(model, LONG, config, n_gpu_layers=-1, **{**BATCHES, **options}))
        for name in environment:
            del os.environ[name]
    return found


def run_in_batches(model, config, batches):
    return run(model, [config], **batches)


# ---- lookups on the device


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("test", {"type": "q8_0"}),
        ("test", {"type": "q4_k_m"}),
        ("test-gpt-oss", {"type": "mxfp4"}),
        ("test-shared", {"type": "q4_0", "fused": True}),
        ("test", {"type": "q4_0", "experts": 15, "layers": 3}),
    ],
    ids=["q8_0", "q4_k_m", "biases", "fused", "odd"],
)
def test_lookups_on_the_device(synthetic, stock_trace, late, shape, options):
    model = synthetic(shape, **options)
    stock = stock_trace(model, n_prompt=LONG, **CPU)
    configs = [{"budget": budget} for budget in ("min", "50%", "100%")]
    for config, (paged, stats) in zip(configs, apart(run, model, configs, environment=late), strict=True):
        assert_equal(paged, stock)
        assert stats["inner_device"] == "LATE0" and stats["notices"] == []
        assert stats["locked_bytes"] >= stats["expert_bytes"]
        if config["budget"] == "100%":
            assert (stats["path"], stats["misses"]) == ("resident", 0)
            continue
        # 12 tokens are decoded with a lookup in each layer; the prompt's batches exceed the slots.
        assert stats["device_lookups"] == 12 * stats["n_layers"] < stats["lookups"]
        assert stats["waits"] == stats["lookups"] - stats["device_lookups"], "no wait for those"
        assert stats["hits"] + stats["misses"] == stats["requests"] and stats["misses"] > 0
        assert stats["bytes_paged"] > 0 and stats["evictions"] > 0
        # All layers but the first are predicted from the second token on; synthetic routers make that easy.
        n_predicted = 11 * (stats["n_layers"] - 1)
        assert stats["predicted"] == n_predicted * stats["n_expert_used"]
        assert 0.8 < stats["predicted_right"] / stats["predicted"] <= 1
        assert 0 <= stats["late_hits"] <= stats["prefetch_used"] <= stats["prefetched"] <= stats["predicted"]


# ---- prefetch


def run_ahead(model, configs, n_decode):
    load_late()
    found = []
    for config in configs:
        os.environ.update(config.pop("environment"))
        llama = make(model, {"inner": "LATE0", **config}, n_gpu_layers=-1, **BATCHES)
        # The second prompt takes the tables back to the host.
        parts = [trace(llama, LONG, n_decode) for _ in range(2)]
        found.append((parts, llama.rotary_stats()))
        llama.close()
    return found


@pytest.mark.parametrize("budget", ["min", "50%"])
def test_copies_ahead_stop_for_what_is_wanted(tiny_model, stock_trace, late, budget):
    # Two thirds of the predictions are right for the trained model's routers.
    n_decode = 20
    stock = stock_trace(tiny_model, n_prompt=LONG, n_decode=n_decode, **CPU)
    # An expert has three pieces: if four are copied, the second expert comes late, and others hardly begin.
    ways = {"fast": ("0", True), "slow": ("4", True), "never": ("0", False)}
    configs = [
        {"budget": budget, "prefetch": on, "environment": {"LATE_PIECES": pieces}}
        for pieces, on in ways.values()
    ]
    results = dict(zip(ways, apart(run_ahead, tiny_model, configs, n_decode, environment=late), strict=True))
    for parts, stats in results.values():
        for part in parts:
            assert_equal(part, stock)
        assert stats["hits"] + stats["misses"] == stats["requests"]
    slow, never = results["slow"][1], results["never"][1]
    assert 0 < slow["late_hits"] <= slow["prefetch_used"] < slow["prefetched"] < slow["predicted"]
    assert 0.4 < slow["predicted_right"] / slow["predicted"] < 0.95
    assert never["predicted"] == never["prefetched"] == never["prefetch_used"] == 0
    fast = results["fast"][1]
    assert fast["prefetch_used"] > 0 and fast["predicted"] == slow["predicted"]


def run_without_outputs(model, config, n_decode):
    """Logits after a prompt of which only the last part has outputs, and after `n_decode` greedy tokens."""
    load_late()
    llama = make(model, {"inner": "LATE0", **config}, n_gpu_layers=-1, n_ubatch=2, logits_all=False)
    llama.eval([7])  # so that routers are known
    found = []
    for _ in range(2):
        llama.reset()
        llama.eval(prompt_tokens(llama.n_vocab(), LONG))
        for _ in range(n_decode):
            found.append(list(llama._ctx.get_logits_ith(-1)[: llama.n_vocab()]))
            llama.eval([max(range(llama.n_vocab()), key=found[-1].__getitem__)])
    return found, llama.rotary_stats()


def test_layers_that_nobody_wants_the_output_of(synthetic, stock_trace, late):
    # The last layer is predicted for each part of the prompt, but looked up only for the last.
    model = synthetic(type="q8_0")
    found, stats = apart(run_without_outputs, model, {"budget": "50%"}, 6, environment=late)
    stock = stock_trace(model, n_prompt=LONG, use_extra_bufts=False, n_ubatch=2)["logits"][LONG - 1 :]
    for i, logits in enumerate(found):
        assert (stock[i % 6] == logits).all(), i
    assert stats["device_lookups"] > 2 * 30 * 3 and stats["prefetch_used"] > 0


def test_the_same_figures_as_the_hosts(synthetic, late):
    # The device's page table makes the same decisions as the host's slot table.
    model = synthetic(type="q8_0")
    base = {"budget": "50%", "prefetch": False}
    configs = [base, {**base, "environment": {"ROTARY_DEVICE_LOOKUPS": "0"}}]
    (_, device), (_, host) = apart(run, model, configs, environment=late)
    assert device["device_lookups"] > 0 == host["device_lookups"]
    assert device["notices"] == host["notices"] == []
    for figure in ("lookups", "requests", "hits", "misses", "evictions", "bytes_paged"):
        assert device[figure] == host[figure], figure
    same = [{**layer, "device_lookups": 0} for layer in device["layers"]]
    assert same == [{**layer, "device_lookups": 0} for layer in host["layers"]]


def count_anew(model):
    load_late()
    llama = make(model, {"inner": "LATE0", "budget": "50%"}, n_gpu_layers=-1, **BATCHES)
    trace(llama, LONG, 12)
    llama.rotary_reset_stats()
    reset = llama.rotary_stats()
    for token in (5, 6):
        llama.eval([token])
    return reset, llama.rotary_stats()


def test_a_reset_covers_what_the_device_has_counted(synthetic, late):
    model = synthetic(type="q8_0")
    reset, stats = apart(count_anew, model, environment=late)
    for figure in ("lookups", "device_lookups", "requests", "hits", "misses", "evictions", "bytes_paged"):
        assert reset[figure] == 0, figure
    assert stats["device_lookups"] == stats["lookups"] == 2 * stats["n_layers"]
    assert stats["requests"] == stats["lookups"] * 4


def test_policies_that_the_device_cannot_run(synthetic, stock_trace, late):
    model = synthetic(type="q8_0")
    configs = [{"budget": "50%", "policy": policy} for policy in ("auto", "lru", "recall")]
    results = apart(run, model, configs, environment=late)
    for (paged, stats), chosen in zip(results, ("lfu", "lru", "recall"), strict=True):
        assert_equal(paged, stock_trace(model, n_prompt=LONG, **CPU))
        assert stats["policy"] == chosen
        assert (stats["device_lookups"] > 0) == (stats["notices"] == []) == (chosen != "recall")
    assert "policy recall cannot run on LATE0" in results[2][1]["notices"][0]


def record_some(model):
    load_late()
    llama = make(model, {"inner": "LATE0", "budget": "50%"}, n_gpu_layers=-1, **BATCHES)
    llama._rotary.pools.trace(True)
    trace(llama, LONG, 4)
    return llama.rotary_stats()


def test_recording_is_slower_and_says_so(synthetic, late):
    stats = apart(record_some, synthetic(type="q8_0"), environment=late)
    [notice] = stats["notices"]
    assert "recorded, the host resolves lookups" in notice and stats["device_lookups"] == 0


def test_prefetch_that_the_device_cannot_have(synthetic, stock_trace, late):
    plain, half = synthetic(type="q8_0"), synthetic(type="q8_0", routers="f16")
    [(paged, stats)] = apart(run, plain, [{"budget": "50%", "prefetch": "mixed"}], environment=late)
    assert_equal(paged, stock_trace(plain, n_prompt=LONG, **CPU))
    [notice] = stats["notices"]
    assert "named by the next layers' routers, not by mixed" in notice
    assert stats["predictor"] == "router" and stats["predicted_right"] > 0
    [(paged, stats)] = apart(run, half, [{"budget": "50%"}], environment=late)
    assert_equal(paged, stock_trace(half, n_prompt=LONG, **CPU))
    [notice] = stats["notices"]
    assert "the router of layer 0, and maybe others, cannot be applied early" in notice
    assert "not there as F32" in notice and "not prefetched" in notice
    assert stats["predicted"] == 0 < stats["device_lookups"]


# ---- the device's memory


def test_auto_takes_what_the_device_has(tiny_model, stock_trace, late):
    base = {"budget": "auto", "margin": "2MiB"}
    sizes = {
        "all": {"LATE_MEMORY": str(64 << 20)},
        "some": {"LATE_MEMORY": str(14 << 20)},
        "in pieces": {"LATE_MEMORY": str(14 << 20), "LATE_LOST": str(4 << 20)},
        "least": {"LATE_MEMORY": str(8 << 20)},
    }
    configs = [{**base, "environment": {"LATE_LOST": "0", **size}} for size in sizes.values()]
    results = dict(zip(sizes, apart(run, tiny_model, configs, environment=late), strict=True))
    for paged, _ in results.values():
        assert_equal(paged, stock_trace(tiny_model, n_prompt=LONG, **CPU))
    slots = {size: stats["n_slots"] for size, (_, stats) in results.items()}
    assert slots["all"] == 32 > slots["some"] > slots["in pieces"] >= slots["least"] == 4
    for size, (_, stats) in results.items():
        said = any(
            "LATE0 has no room for the slots; auto budget lowered to" in text for text in stats["notices"]
        )
        assert said == (size == "in pieces"), stats["notices"]


# ---- where host memory cannot be pinned


@pytest.mark.parametrize("budget", ["min", "50%"])
def test_ways_of_pinning(synthetic, stock_trace, late, budget):
    model = synthetic(type="q4_0")
    stock = stock_trace(model, n_prompt=LONG, **CPU)
    ways = {
        "default": ({"environment": {"LATE_LOCK": "default"}}, None),
        "copy": ({"environment": {"LATE_LOCK": "new"}, "pin": "on"}, None),
        "ring": ({"environment": {"LATE_LOCK": "new"}}, "pass through"),
        "asked": ({"pin": "off"}, 'pin is "off"'),
        "none": (
            {"environment": {"LATE_LOCK": "none"}},
            "waits for each layer: LATE0: no memory can be page-locked",
        ),
        "no link": ({"environment": {"ROTARY_LINK": "/nowhere/link.so"}}, "/nowhere/link.so"),
    }
    configs = [{"budget": budget, **config} for config, _ in ways.values()]
    environment = {**late, "LATE_DEVICE": late["ROTARY_LINK"]}
    results = apart(run, model, configs, environment=environment)
    for (way, (_, notice)), (paged, stats) in zip(ways.items(), results, strict=True):
        assert_equal(paged, stock)
        assert (stats["device_lookups"] > 0) == (notice is None), way
        if notice is None:
            assert stats["notices"] == [], way
            assert stats["locked_bytes"] >= stats["expert_bytes"]
        else:
            assert len(stats["notices"]) == 1 and notice in stats["notices"][0], (way, stats["notices"])
            assert stats["locked_bytes"] < stats["expert_bytes"] or way in ("ring", "asked")


def test_blocks_of_the_ring_are_used_again(synthetic, stock_trace, late):
    # Batches of 4 tokens want about 10 of 14 slots: with three tensors each, more pieces than ring blocks.
    model = synthetic(type="q4_0")
    batches = {"n_ubatch": 4}
    [(paged, stats)] = apart(
        run_in_batches, model, {"budget": "14 slots", "pin": "off"}, batches, environment=late
    )
    assert_equal(paged, stock_trace(model, n_prompt=LONG, use_extra_bufts=False, **batches))
    assert stats["path"] == "slots" and stats["waves"] == 0


@pytest.mark.parametrize("lock", ["", "none"])
def test_direct_store(synthetic, stock_trace, late, lock):
    model = synthetic(type="q8_0")
    configs = [{"budget": budget, "store": "direct"} for budget in ("min", "50%")]
    for paged, stats in apart(run, model, configs, environment={**late, "LATE_LOCK": lock}):
        assert_equal(paged, stock_trace(model, n_prompt=LONG, **CPU))
        assert stats["store"] == "direct" and stats["bytes_read"] > 0 and stats["device_lookups"] == 0
        assert (notices(stats) != []) == (lock == "none")


# ---- a tier in RAM between the disk and the device


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("pin", ["auto", "off"])
def test_a_tier_in_ram(synthetic, stock_trace, late, prefetch, pin):
    model = synthetic(type="q8_0")
    least = 4 * sum(t.n_bytes for t in read_header(model).tensors if "_exps" in t.name) // 16
    sizes = {"none": 1, "least": least, "half": 2 * least, "all": 1 << 30}
    base = {"budget": "min", "store": "direct", "prefetch": prefetch, "pin": pin}
    configs = [{**base, "environment": {"ROTARY_RAM": str(size)}} for size in sizes.values()]
    results = dict(zip(sizes, apart(run, model, configs, environment=late), strict=True))
    for size, (paged, stats) in results.items():
        assert_equal(paged, stock_trace(model, n_prompt=LONG, **CPU))
        assert (stats["ram_bytes"] > 0) == (stats["bytes_in_place"] > 0) == (size != "none"), size
        assert 0 <= stats["ram_hits"] <= stats["misses"]
        assert (notices(stats) != []) == (pin == "off" or size == "none"), stats["notices"]
        for text in notices(stats):
            said = "no slots in RAM" if size == "none" else "slots in RAM are not page-locked"
            assert said in text and (size == "none" or 'pin is "off"' in text)
    assert results["none"][1]["ram_hits"] == 0 < results["half"][1]["ram_hits"]
    if not prefetch:
        # A larger tier means fewer reads; the prompt's reads bypass it.
        n_read = [stats["bytes_read"] for _, stats in results.values()]
        assert n_read == sorted(n_read, reverse=True) and n_read[0] > n_read[-1]


class Told(policies.Lru):
    """Raises if a resident expert has left other slots than the device's; all are wanted."""

    def enter(self, expert, wanted):
        super().enter(expert, wanted)
        assert wanted, f"{expert} had left a slot in RAM"


def test_a_tier_in_ram_has_a_policy_of_its_own(synthetic, stock_trace, late):
    model = synthetic(type="q8_0")
    half = sum(t.n_bytes for t in read_header(model).tensors if "_exps" in t.name) // 2
    config = {"budget": "min", "store": "direct", "prefetch": False, "policy": Told}
    [(paged, stats)] = apart(
        run, model, [{**config, "environment": {"ROTARY_RAM": str(half)}}], environment=late
    )
    assert_equal(paged, stock_trace(model, n_prompt=LONG, **CPU))
    assert stats["ram_hits"] > 0 and stats["policy"] == "Told" and notices(stats) == []


def test_no_tier_in_ram_is_announced(synthetic, stock_trace, late):
    # Experts with Q8_0 rows of 96 elements begin anywhere in a sector.
    odd = synthetic(type="q8_0", embd=96, ff=96, heads=3, heads_kv=1, layers=2)
    config = {"budget": "min", "store": "direct"}
    small = {**config, "environment": {"ROTARY_RAM": "64KiB"}}
    cases = [(odd, config, "no whole sectors"), (synthetic(type="q8_0"), small, "do not fit into 0.1 MiB")]
    for model, changed, reason in cases:
        [(paged, stats)] = apart(run, model, [changed], environment=late)
        assert_equal(paged, stock_trace(model, n_prompt=LONG, **CPU))
        [notice] = notices(stats)
        assert stats["ram_bytes"] == 0 and "no slots in RAM" in notice and reason in notice


def with_little_address_space(model):
    load_late()
    llama = make(model, {"inner": "LATE0", "budget": "min", "store": "direct", "pin": "off"}, n_gpu_layers=-1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used - (64 << 20), -1))
    llama.rotary_set_budget("5 slots")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    llama.eval([1, 2, 3])
    return llama.rotary_stats()


def test_a_tier_that_the_system_refuses_is_announced(synthetic, late):
    # At first all 144 MiB of experts fit into the tier; then the address space is limited to less.
    model = synthetic(type="f16", used=2, ff=512, embd=768, heads=4, head_dim=64)
    stats = apart(with_little_address_space, model, environment={**late, **ONE_ARENA})
    refused = [text for text in stats["notices"] if "no slots in RAM" in text]
    assert len(refused) == 1 and "the system refuses" in refused[0]
    assert stats["ram_bytes"] == 0 < stats["misses"]


def memory_where_the_file_was(model):
    """Map memory into the holes that llama.cpp leaves in a file's mapping; whether each stays unchanged."""
    from rotary_llamacpp.runtime import paging

    load_late()
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed_private_anonymous = 0x100000 | 2 | 32  # MAP_FIXED_NOREPLACE
    holes, size = [], 64 << 10
    start = paging.Paging.start

    def fill_holes(self, llama, config):
        lines = Path("/proc/self/maps").read_text().splitlines()
        pieces = [
            [int(end, 16) for end in each.split()[0].split("-")] for each in lines if str(model) in each
        ]
        for (_, begin), (end, _) in itertools.pairwise(pieces):
            for at in range(begin, end, size):  # part of it may be in use again
                if libc.mmap(at, size, 3, fixed_private_anonymous, -1, 0) == at:
                    ctypes.memset(at, 0xA5, size)
                    holes.append(at)
        start(self, llama, config)

    paging.Paging.start = fill_holes
    llama = make(model, {"inner": "LATE0", "budget": "min", "store": "direct"}, n_gpu_layers=-1, **BATCHES)
    llama.eval([1, 2, 3])
    return [ctypes.string_at(at, size) == b"\xa5" * size for at in holes]


def test_nobody_elses_memory_is_given_back(synthetic, late):
    # llama.cpp unmaps weights that go to the device; memory mapped there later is not the library's.
    untouched = apart(memory_where_the_file_was, synthetic(type="q8_0", vocab=40000), environment=late)
    assert len(untouched) > 20 and all(untouched)


def fail_reads(model, starts):
    """For each start: the error, or exactness, of a run with failing reads, and exactness of the next run."""
    load_late()
    disk = Disk()
    config = {"inner": "LATE0", "budget": "50%", "store": "direct"}
    llama = make(model, config, n_gpu_layers=-1, **BATCHES)
    stock = trace(llama, LONG, 12)
    found = []
    for start in starts:
        disk.fail_next(1 if start % 2 else 1 << 20, after=start)
        try:
            kind = bool((trace(llama, LONG, 12)["logits"] == stock["logits"]).all())
        except ReadError as error:
            kind = str(error)
        disk.mend()
        found.append((kind, bool((trace(llama, LONG, 12)["logits"] == stock["logits"]).all())))
    return stock, found


def test_reads_into_ram_that_fail(synthetic, stock_trace, late, disk):
    model = synthetic(type="q8_0", layers=3)
    environment = {**late, **disk["threads"], "LATE_US": "20"}
    stock, found = apart(fail_reads, model, list(range(0, 90, 9)), environment=environment)
    assert_equal(stock, stock_trace(model, n_prompt=LONG, **CPU))
    assert all(after for _, after in found)
    refused = [kind for kind, _ in found if isinstance(kind, str)]
    assert refused and all("Input/output error" in kind for kind in refused)
    assert all(kind for kind, _ in found), "neither refused nor exact"


# ---- several devices


def run_on_all(model, configs):
    """Like `run`, but on the default devices: all that existed when the library was loaded."""
    load_late()
    found = []
    for config in configs:
        found.append(paged_trace(model, LONG, config, n_gpu_layers=-1, **BATCHES))
    return found


def test_layers_split_over_devices(synthetic, stock_trace, late):
    model = synthetic(type="q8_0", layers=5)
    stock = stock_trace(model, n_prompt=LONG, **CPU)
    n_bytes = read_header(model).n_bytes // 2
    configs = [
        {"budget": "50%"},
        {"budget": n_bytes},
        {"budget": "min", "store": "direct"},
        {"budget": "min", "inner": "LATE1, LATE0"},
        {"budget": "min", "inner": "LATE1"},
    ]
    results = apart(run_on_all, model, configs, environment={**late, "LATE_DEVICES": "2"})
    for config, (paged, stats) in zip(configs, results, strict=True):
        assert_equal(paged, stock)
        default = config.get("inner") is None
        assert stats["inner_device"] == ("LATE0, LATE1" if default else config["inner"])
        assert [layer["il"] for layer in stats["layers"]] == list(range(5)) and stats["n_layers"] == 5
        for name in ("requests", "hits", "misses", "lookups"):
            assert stats[name] == sum(layer[name] for layer in stats["layers"]) > 0, name
        assert (stats["device_lookups"] > 0) == (config.get("store") != "direct")
        assert stats["notices"] == [] and stats["path"] == "slots"
    budget = results[1][1]
    assert n_bytes * 0.9 < budget["budget_bytes"] <= n_bytes + 2, "one budget for both"
    slots = {layer["n_slots"] for layer in budget["layers"]}
    assert max(slots) - min(slots) <= 1, "divided as the experts are"


# ---- the link to CUDA devices


def test_the_cuda_link_without_a_gpu(native):
    # The library is built, can be loaded, has this ABI, and gives a reason for a device that does not exist.
    library = _native.library_path().with_name("libggml-rotary-cuda.so")
    if not library.is_file():
        pytest.skip("built without nvcc")
    loaded = ctypes.CDLL(str(library))
    loaded.rotary_link_get.restype = ctypes.POINTER(Api)
    api = loaded.rotary_link_get().contents
    assert (api.abi, api.kind) == (2, b"CUDA")
    reason = ctypes.create_string_buffer(256)
    assert not api.open(b"ffff:ff:1f.0", reason, 256)
    assert reason.value.startswith(b"cudaDeviceGetByPCIBusId: "), reason.value


class Api(ctypes.Structure):
    """The first members of rotary_link_api in link_api.h."""

    _fields_ = (
        ("abi", ctypes.c_int32),
        ("kind", ctypes.c_char_p),
        ("open", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)),
    )


# ---- failing


def run_with_failures(model, configs, starts):
    """For each start: the result of a run in which that request to the link fails, and of the next run."""
    load_late()
    found = []
    for config in configs:
        llama = make(model, {"inner": "LATE0", **config}, n_gpu_layers=-1, **BATCHES)
        for start in starts:
            os.environ["LATE_FAIL"] = str(start)
            failed = attempt(trace, llama, LONG, 12)
            del os.environ["LATE_FAIL"]
            found.append((failed, trace(llama, LONG, 12)))
        llama.close()
    return found


def test_failing_links(synthetic, stock_trace, late):
    model = synthetic(type="q8_0", layers=2)
    stock = stock_trace(model, n_prompt=LONG, **CPU)
    configs = [{"budget": "50%"}, {"budget": "50%", "pin": "off"}]
    found = apart(run_with_failures, model, configs, [1, 2], environment=late)
    assert len(found) == 4
    for (_, text), after in found:
        assert "the link is broken" in text and "LATE0" in text, text
        assert_equal(after, stock)


def run_with_wild_routings(model, config, after):
    """Results of a token whose routings name no valid expert, and of a run with `after` prompt tokens."""
    load_late()
    llama = make(model, {"inner": "LATE0", **config}, n_gpu_layers=-1, **BATCHES)
    llama.eval([3])
    os.environ["LATE_WILD"] = "1"
    failed = attempt(llama.eval, [5])
    del os.environ["LATE_WILD"]
    return failed, trace(llama, after, 12)


@pytest.mark.parametrize("after", [LONG, 1], ids=["tables to the host", "tables on the device"])
def test_a_refused_lookup_fails_its_own_graph(synthetic, stock_trace, late, after):
    model = synthetic(type="q8_0", layers=2)
    (_, text), paged = apart(run_with_wild_routings, model, {"budget": "50%"}, after, environment=late)
    assert "routed to an expert that it does not have" in text
    assert_equal(paged, stock_trace(model, n_prompt=after, **CPU))


# ---- events, streams and pinned memory that are refused


def test_devices_without_events(synthetic, stock_trace, late):
    model = synthetic(type="q8_0")
    configs = [
        {"budget": "50%", "environment": {"LATE_EVENTS": "none"}},
        {"budget": "50%", "store": "direct", "environment": {"LATE_EVENTS": "none"}},
        {"budget": "50%", "environment": {"LATE_OPEN": "none"}},
        {"budget": "50%"},
    ]
    results = apart(run, model, configs, environment=late)
    reasons = ["it has no events", "it has no events", "no stream", None]
    for (paged, stats), reason in zip(results, reasons, strict=True):
        assert_equal(paged, stock_trace(model, n_prompt=LONG, **CPU))
        said = [text for text in stats["notices"] if "waits for each layer" in text]
        assert len(said) == (reason is not None) and all(f"LATE0: {reason}" in text for text in said)
        assert (stats["device_lookups"] > 0) == (reason is None)


def run_short_of(knob, model, configs):
    """For each config, refuse the 1st, 2nd, ... request while there are any; errors, notices, next run."""
    load_late()
    found = []
    for config in configs:
        usual = run(model, [config])[0][1]["notices"]
        for nth in itertools.count(1):
            os.environ[knob] = str(nth)
            said = []
            llama = make(model, {"inner": "LATE0", **config}, n_gpu_layers=-1, **BATCHES)
            try:
                trace(llama, 4, 1)
            except DeviceError as error:
                said.append(str(error))
            del os.environ[knob]
            after, notices = trace(llama, LONG, 12), llama.rotary_stats()["notices"]
            llama.close()
            found.append((said + notices, after))
            if not said and notices == usual:
                break
    return found


def test_each_event_that_cannot_be_had(synthetic, stock_trace, late):
    model = synthetic(type="q8_0", layers=2)
    configs = [{"budget": "50%"}, {"budget": "50%", "pin": "off"}]
    found = apart(run_short_of, "LATE_EVENTS", model, configs, environment={**late, "LATE_US": "20"})
    stock = stock_trace(model, n_prompt=LONG, **CPU)
    for _, after in found:
        assert_equal(after, stock)
    heard = " ".join(text for said, _ in found for text in said)
    assert len(found) > 2 * 7 + 16, "one for lookups, one for copies, one for each block of the ring..."
    for text in ("LATE0: it has no events", "LATE0: no events for the memory", "LATE0: no event is left"):
        assert text in heard, text


def test_each_pinned_memory_that_cannot_be_had(synthetic, stock_trace, late):
    model = synthetic(type="q8_0", layers=2)
    configs = [
        {"budget": "50%"},
        {"budget": "50%", "pin": "off"},
        {"budget": "50%", "store": "direct"},
    ]
    found = apart(run_short_of, "LATE_NEW", model, configs, environment={**late, "LATE_US": "20"})
    stock = stock_trace(model, n_prompt=LONG, **CPU)
    for _, after in found:
        assert_equal(after, stock)
    heard = " ".join(text for said, _ in found for text in said)
    for text in (
        "cannot count lookups for the host: out of memory",
        "no memory can be page-locked, out of memory",
        "slots in RAM are not page-locked",
    ):
        assert text in heard, text


# ---- life


def reopen(model):
    """Run after loading, after a change of budget, beside a second model and after it, by plain llama_cpp."""
    import llama_cpp

    load_late()
    config = {"inner": "LATE0", "budget": "min"}
    first = make(model, config, n_gpu_layers=-1, **BATCHES)
    found = [trace(first, LONG, 12)]
    first.rotary_set_budget("50%")
    found.append(trace(first, LONG, 12))
    second = make(model, config, n_gpu_layers=-1, **BATCHES)
    found.append(trace(second, LONG, 12))
    found.append(trace(first, LONG, 12))
    first.close()
    found.append(trace(second, LONG, 12))
    second.close()
    activate(config)
    third = llama_cpp.Llama(
        str(model), n_gpu_layers=-1, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True,
        verbose=False, **BATCHES,
    )  # fmt: skip
    found.append(trace(third, LONG, 12))
    third.close()
    deactivate()
    return found


def test_budgets_and_models_that_come_and_go(synthetic, stock_trace, late):
    model = synthetic(type="q8_0", layers=3)
    stock = stock_trace(model, n_prompt=LONG, **CPU)
    found = apart(reopen, model, environment=late)
    assert len(found) == 6
    for paged in found:
        assert_equal(paged, stock)


def load_an_adapter_late(model, adapter, configs):
    """Stock's trace with the adapter; for each config, traces with it loaded late and without, statistics."""
    import llama_cpp.llama_cpp as api

    load_late()
    stock = make(model, None, n_gpu_layers=0, lora_path=str(adapter), **BATCHES)
    found = [trace(stock, LONG, 12)]
    for config in configs:
        llama = make(model, {"inner": "LATE0", **config}, n_gpu_layers=-1, **BATCHES)
        trace(llama, LONG, 1)
        late = api.llama_adapter_lora_init(llama._model.model, str(adapter).encode())
        use_adapter(llama, late)
        with_it, stats = trace(llama, LONG, 12), llama.rotary_stats()
        use_adapter(llama, None)
        api.llama_adapter_lora_free(late)
        found.append((with_it, trace(llama, LONG, 12), stats))
        llama.close()
    return found


def test_experts_that_come_late_are_pinned(tiny_model, stock_trace, late, lora_adapter):
    adapter = lora_adapter(tiny_model, ("ffn_down_exps.weight",))
    configs = [{"budget": "50%", "pin": pin} for pin in ("auto", "on", "off")]
    stock, *found = apart(load_an_adapter_late, tiny_model, adapter, configs, environment=late)
    for config, (with_it, without, stats) in zip(configs, found, strict=True):
        assert_equal(with_it, stock)
        assert_equal(without, stock_trace(tiny_model, n_prompt=LONG, **CPU))
        assert (stats["locked_bytes"] >= stats["expert_bytes"]) == (config["pin"] != "off")
