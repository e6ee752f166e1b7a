# SPDX-License-Identifier: MIT
"""The plan: a model of two layers worked out on paper, named shapes against published sizes, the command.

The model has two layers of four experts of 100 MiB, one of them used; 300 MiB of other weights, of which a
token reads 200; and a KV cache of 1 MiB per token and layer. The request is a context of 10 tokens, a prompt
of 4 and an answer of 4, so that the cache has 6 tokens on average. A token then reads 200 + 2 x 100 + 6 x 2 =
412 MiB, which takes a second on the CPU by the chosen rates (in MiB/s). The hit rate is three quarters with
any number of slots.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import struct
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from rotary_llamacpp.display.plan import describe
from rotary_llamacpp.errors import BudgetError, ModelError, RotaryError
from rotary_llamacpp.gguf_files.info import LayerInfo, read_shards
from rotary_llamacpp.host import disk, machine
from rotary_llamacpp.native import binding as _native
from rotary_llamacpp.planning import calibration, division, footprint, hits, plan, shapes
from rotary_llamacpp.planning.options import at_budgets, options, recommend
from rotary_llamacpp.planning.roofline import COMPUTE, DISK, LINK, RAM, STEPS, VRAM, Case, Machine, Request
from rotary_llamacpp.traces import profiles
from tests.support.work import Calls

MIB = 1 << 20
LAYERS = tuple(LayerInfo(il, "exps", 4, 1, 100 * MIB, ("Q8_0",)) for il in range(2))
MODEL = footprint.Footprint(
    name="two", architecture="made-up", n_layer=2, n_embd=0, n_vocab=0, n_ctx_train=10, n_params=1,
    file_bytes=1100 * MIB, resident_bytes=300 * MIB, token_bytes=200 * MIB, token_flops=400.0,
    expert_flops=200.0, output_flops=100.0, layers=LAYERS, matrices=(),
    dense=footprint.Matrix("Q8_0", 1, 1, 1),
    cached=(footprint.CachedLayer(MIB // 2, 0),) * 2,
)  # fmt: skip
HERE = Machine(
    vram_bytes=0, ram_bytes=4096 * MIB, vram_rate=824 * MIB, link_rate=100 * MIB, ram_rate=412 * MIB,
    copy_rate=100 * MIB, disk_rate=50 * MIB, gpu_flops=1000.0, cpu_flops=250.0,
)  # fmt: skip
THREE_QUARTERS = hits.Hits(lambda n_slots: 0.75, "a test")
# MiB that four tokens, each of which chooses one of four experts, use in a layer: 400 x (1 - (3/4)^4).
TOUCHED = 273.4375


def case(budget="auto", **changes):
    request = Request(n_ctx=10, prompt=4, answer=4, n_ubatch=4)
    return Case("two.gguf", MODEL, replace(HERE, **changes), request, THREE_QUARTERS, budget)


def by_key(found):
    return {option.key: option for option in found}


# ---- the roofline, on paper


def test_cpu_with_room_for_everything():
    found = by_key(options(case()))
    assert set(found) == {"cpu", "rotary-cpu"}
    for option in found.values():
        assert option.decode.parts == {RAM: pytest.approx(1.0)}, "where all have slots, none is missed"
        # 400 operations, less 100 of the output matrix, and 200 of experts, at 250 per second.
        assert option.prefill.seconds == pytest.approx(2.0) and option.prefill.limit == COMPUTE
    assert found["cpu"].ram_bytes == (200 + 20 + 100 + 800) * MIB
    best, why = recommend(case(), list(found.values()))
    assert best.key == "cpu" and why.startswith("do not use Rotary here: everything fits")
    assert best.command == "llama-cli -m two.gguf -ngl 0 -c 10"


def test_misses_are_copied_from_the_page_cache():
    # A quarter of 200 MiB is missed, and copied at 100 MiB/s: half a second beside the second of computing.
    option = by_key(options(case(budget="2 slots")))["rotary-cpu"]
    assert option.n_slots == (2, 2) and option.store == "mmap" and option.uniform_hit_rate == 0.5
    assert option.decode.seconds == pytest.approx(1.5)
    assert option.command == "rotary run two.gguf -p \"...\" --budget '2 slots' --ctx 10"


def test_cpu_with_too_little_memory():
    # Of 960 MiB, 64 stay free, weights, cache and embeddings take 320, and staging a 24th, 40: 536 are left,
    # five experts. A token misses 50 MiB, a second at 50 MiB/s; with a second of computing that is root 2.
    found = by_key(options(case(ram_bytes=960 * MIB)))
    rotary = found["rotary-cpu"]
    assert (rotary.budget_bytes, rotary.n_slots, rotary.store) == (536 * MIB, (3, 2), "direct")
    assert rotary.decode.parts == {RAM: pytest.approx(1.0), DISK: pytest.approx(1.0)}
    assert rotary.decode.seconds == pytest.approx(math.sqrt(2))
    # A prompt's micro-batch of four reads absent experts while computing, a third of both layers' 273 MiB,
    # and copies them.
    absent = 2 * TOUCHED * (1 - 536 / 800) / 4
    assert rotary.prefill.parts[DISK] == pytest.approx(absent / 50)
    assert rotary.prefill.seconds == pytest.approx(2.0 + absent / 100)
    # Stock's page cache holds 576 of 800 MiB: the misses are the same, and computing and reading add up.
    assert found["cpu"].decode.seconds == pytest.approx(2.0)
    assert found["cpu"].prefill.seconds == pytest.approx(2 + 2 * TOUCHED * 0.28 / 50 / 4)
    assert "--no-repack" in found["cpu"].command
    best, why = recommend(case(ram_bytes=960 * MIB), list(found.values()))
    assert best.key == "rotary-cpu"
    gain = (found["cpu"].prefill.seconds + 2.0) / (2.0 + absent / 100 + math.sqrt(2))
    assert why.startswith(f"{gain:.2f} times as fast as stock's best")


def test_everything_fits_the_gpu():
    # 200 + 20 + 800 MiB, and the 1024 that llama.cpp leaves free.
    found = options(case(vram_bytes=2044 * MIB))
    assert [option.key for option in found] == ["resident", "cpu", "rotary-cpu"]
    assert found[0].decode.parts == {VRAM: pytest.approx(0.5)} and found[0].prefill.seconds == 0.5
    best, why = recommend(case(vram_bytes=2044 * MIB), found)
    assert best.key == "resident" and "everything fits into VRAM" in why
    assert by_key(options(case(vram_bytes=2043 * MIB)))["resident"].problem


def test_experts_on_the_cpu():
    # 1700 - 1024 - 220 = 456 MiB hold one layer's 400: the first layer's experts stay on the CPU.
    found = by_key(options(case(vram_bytes=1700 * MIB)))
    offload, plain = found["op-offload"], found["cpu-experts"]
    assert "-ngl 99 --n-cpu-moe 1 -lm none -c 10" in offload.command
    assert "-ngl 99 --n-cpu-moe 1 -lm none --no-op-offload -c 10" in plain.command
    for option in (offload, plain):
        assert option.decode.parts == {VRAM: pytest.approx(312 / 824), RAM: pytest.approx(100 / 412)}
        assert option.vram_bytes == 620 * MIB and option.ram_bytes == 500 * MIB
    # With op-offload, a layer's experts cross the link for each micro-batch.
    assert offload.prefill.seconds == pytest.approx(0.5 + TOUCHED / 100 / 4)
    # Without it, half of the experts' 200 operations run at 250 per second instead of 1000.
    assert plain.prefill.seconds == pytest.approx(0.4 + 0.4)
    # Mapped experts that do not fit into memory get a third of the link's rate, and wait for the disk.
    mapped = by_key(options(case(vram_bytes=1700 * MIB, ram_bytes=500 * MIB)))["op-offload"]
    assert "-lm none" not in mapped.command
    assert (
        mapped.prefill.parts[LINK] == pytest.approx(TOUCHED / (100 / 3) / 4) and DISK in mapped.prefill.parts
    )


def test_the_rest_of_a_layer_takes_its_time():
    # The rest of two layers takes 0.7 s on the GPU, 1.4 s on the CPU.
    found = by_key(options(case(vram_bytes=2044 * MIB, gpu_layer_s=0.35, cpu_layer_s=0.7)))
    assert found["resident"].decode.seconds == pytest.approx(0.5 + 0.7)
    assert found["cpu"].decode.seconds == pytest.approx(1.0 + 1.4) and found["cpu"].decode.limit == STEPS
    direct = by_key(options(case(ram_bytes=960 * MIB, cpu_layer_s=0.7)))["rotary-cpu"]
    assert direct.decode.seconds == pytest.approx(math.hypot(2.4, 1.0))
    prompts = by_key(options(case(vram_bytes=2044 * MIB, gpu_prompt_layer_s=0.1, cpu_prompt_layer_s=0.2)))
    assert prompts["resident"].prefill.seconds == pytest.approx(0.5 + 0.2)
    assert prompts["cpu"].prefill.seconds == pytest.approx(2.0 + 0.4)


def test_reading_takes_the_processors_time():
    # Reading takes 10 ms per MiB of each processor: 50 MiB of a token, a third of a prompt's 547, copied too.
    found = by_key(options(case(ram_bytes=960 * MIB, disk_cpu_s=0.01 / MIB)))["rotary-cpu"]
    assert found.decode.seconds == pytest.approx(math.hypot(1.5, 1.0))
    assert found.prefill.seconds == pytest.approx(2.0 + 0.02 * 2 * TOUCHED * (1 - 536 / 800) / 4)


def test_repacked_experts_are_rewritten():
    # A prompt of four tokens rewrites half of both layers' 273 MiB at 50 MiB/s; a decoded token 50 MiB.
    repacked = {"repack_rate": 50.0 * MIB}
    found = by_key(options(case(budget="2 slots", **repacked)))["rotary-cpu"]
    assert found.prefill.seconds == pytest.approx(2.0 + TOUCHED / 50 / 4)
    assert found.decode.seconds == pytest.approx(1.0 + 1.0)
    direct = by_key(options(case(ram_bytes=960 * MIB, **repacked)))["rotary-cpu"]
    assert direct.decode.seconds == pytest.approx(math.hypot(1.0 + 1.0, 1.0))


def test_attention_counts_in_prompts():
    # Two layers of 10 heads, keys of 3 and values of 2: 200 operations for each of 4 tokens in the cache.
    heads = replace(case(), print=replace(MODEL, heads=footprint.Heads(10, 5, 3, 2)))
    assert MODEL.attention_flops(4) == 0 and heads.print.attention_flops(4) == 800
    assert by_key(options(heads))["cpu"].prefill.seconds == pytest.approx(2.0 + 800 / 250)
    measured = replace(heads, machine=replace(HERE, cpu_prompt_layer_s=0.5))
    assert by_key(options(measured))["cpu"].prefill.seconds == pytest.approx(2.0 + 1.0)


def test_the_host_waits_for_a_gpu():
    # Once per layer if experts stay on the CPU, or the host resolves lookups; not if experts are page-locked.
    found = by_key(options(case(vram_bytes=1700 * MIB, sync_s=0.1)))
    assert found["cpu-experts"].decode.parts[STEPS] == pytest.approx(0.1)
    assert STEPS not in found["rotary-gpu"].decode.parts
    pageable = by_key(options(case(vram_bytes=1232 * MIB, ram_bytes=1000 * MIB, sync_s=0.1)))
    assert pageable["rotary-gpu"].decode.parts[STEPS] == pytest.approx(0.2)


def test_rotary_on_the_gpu():
    # 1232 - 512 - 220 = 500 MiB are five slots. A token misses 50 MiB, half a second at 100 MiB/s.
    found = by_key(options(case(vram_bytes=1232 * MIB)))
    rotary = found["rotary-gpu"]
    assert (rotary.budget_bytes, rotary.n_slots, rotary.store) == (500 * MIB, (3, 2), "memory")
    assert rotary.decode.parts == {VRAM: pytest.approx(0.5), LINK: pytest.approx(0.5)}
    # A prompt does not move the experts in slots; computing takes longer than moving the rest.
    assert rotary.prefill.parts[LINK] == pytest.approx(2 * TOUCHED * (1 - 500 / 800) / 100 / 4)
    assert rotary.prefill.seconds == pytest.approx(max(0.5, rotary.prefill.parts[LINK]))
    assert "1.21 GiB of VRAM needed" in found["cpu-experts"].problem, "stock's margin is larger"
    best, why = recommend(case(vram_bytes=1232 * MIB), list(found.values()))
    assert best.key == "rotary-gpu" and "75 % of the chosen experts" in why


def test_rotary_on_the_gpu_with_the_disk_behind_memory():
    rotary = by_key(options(case(vram_bytes=1232 * MIB, ram_bytes=600 * MIB)))["rotary-gpu"]
    assert rotary.store == "direct" and rotary.ram_bytes == (600 - 64) * MIB
    # The link has the rate of copies, as no memory is pinned.
    assert rotary.decode.parts[DISK] == pytest.approx(1.0) and rotary.decode.limit == DISK
    assert rotary.decode.seconds == pytest.approx(0.5 + 0.5 + 1.0)
    assert rotary.prefill.limit == DISK
    # Experts that are not whole sectors get no slots in memory.
    odd = replace(MODEL, matrices=(footprint.Matrix("MXFP4", 1, 1, 513),))
    edges = replace(case(vram_bytes=1232 * MIB, ram_bytes=600 * MIB), print=odd)
    assert by_key(options(edges))["rotary-gpu"].ram_bytes == 100 * MIB


def test_the_minimum_is_taken_out_of_the_margin():
    # "auto" takes at least one token's 200 MiB beside 220, if the card has so much.
    found = by_key(options(case(vram_bytes=440 * MIB)))["rotary-gpu"]
    assert found.n_slots == (1, 1) and not found.problem
    assert "VRAM needed" in by_key(options(case(vram_bytes=410 * MIB)))["rotary-gpu"].problem


def test_commands_have_the_budget_that_was_asked_for():
    assert "--budget" not in by_key(options(case()))["rotary-cpu"].command
    found = by_key(options(case(budget="2 slots", vram_bytes=1232 * MIB)))
    assert "--budget '2 slots' --inner CPU" in found["rotary-cpu"].command
    assert "-dev none" in found["cpu"].command


def test_a_small_gain_is_not_worth_it():
    # Rotary is only 3 % faster than stock's best.
    near = case(vram_bytes=1232 * MIB)
    found = options(near)
    best = min(found, key=lambda option: option.seconds(near.request))
    assert best.is_rotary
    slower = [
        replace(option, decode=replace(best.decode, seconds=1.03 * best.decode.seconds), prefill=best.prefill)
        if option.key == "cpu" else option for option in found
    ]  # fmt: skip
    taken, why = recommend(near, slower)
    assert taken.key == "cpu" and "within 5 %" in why


def test_nothing_can_run():
    small = case(ram_bytes=300 * MIB)
    best, why = recommend(small, options(small))
    assert best is None and why.startswith("do not run this model here") and "memory needed" in why


def test_a_dense_model_has_nothing_to_page():
    dense = replace(case(), print=replace(MODEL, layers=(), expert_flops=0.0))
    found = options(dense)
    assert [option.key for option in found] == ["cpu"]
    assert recommend(dense, found)[1].startswith("do not use Rotary here: the model has no experts")
    # With 110 MiB beside the margin the card holds half of the layers; the CPU computes the others.
    shared = by_key(options(replace(dense, machine=replace(HERE, vram_bytes=(1024 + 110) * MIB))))["layers"]
    assert shared.decode.parts == {VRAM: pytest.approx(212 / 824 / 2), RAM: pytest.approx(212 / 412 / 2)}
    assert (shared.vram_bytes, shared.ram_bytes) == (110 * MIB, 210 * MIB)
    assert shared.command == "llama-cli -m two.gguf -c 10"


def test_budgets_for_a_figure_leave_out_what_cannot_run():
    # An eighth of the experts is one expert, less than one for each of two layers.
    points = at_budgets(case(ram_bytes=960 * MIB), (0.125, 0.25, 0.5, 1.0))
    assert [share for share, _ in points] == [0.25, 0.5], "all of them do not fit"


# ---- division and hit rates


def test_division_in_python_equals_the_library(native):
    rng = random.Random(3)
    for _ in range(300):
        layers = []
        for il in range(rng.randint(1, 10)):
            n_expert = rng.randint(1, 40)
            layers.append(LayerInfo(il, "exps", n_expert, rng.randint(1, n_expert), rng.randint(1, 999), ()))
        least = sum(layer.n_expert_used * layer.expert_bytes for layer in layers)
        wanted = rng.randint(least, 2 * least)
        slots, n_bytes = division.divide(str(wanted), layers, 0, "random")
        sizes = [(layer.expert_bytes, layer.n_expert, layer.n_expert_used) for layer in layers]
        assert slots == native.divide_budget(n_bytes, sizes)


def test_a_budget_below_one_tokens_experts_is_refused():
    with pytest.raises(BudgetError, match=r"two: budget 150MiB is 150.0 MiB; one token's experts take 200"):
        division.divide("150MiB", LAYERS, 0, "two")


def test_the_default_curve():
    # For the traces' own sizes both readings of the curve give the hit rates measured on them.
    for slots, rate in ((6, 0.368), (16, 0.661), (32, 0.835), (64, 0.960)):
        assert hits.curve(slots, 128, 6) == pytest.approx(rate, abs=0.002)
    # 4 of 8 experts, with 2 used, are only two tokens' experts: far from the 96 % of 64 of 128 experts.
    assert 0.5 <= hits.curve(4, 8, 2) < 0.6
    assert hits.curve(8, 8, 2) == 1.0
    for n_used in (1, 2, 4, 8):
        rates = [hits.curve(slots, 128, n_used) for slots in range(n_used, 129)]
        assert rates == sorted(rates) and all(r >= n / 128 for n, r in enumerate(rates, start=n_used))


def test_a_profile_counts_where_it_says_more():
    layers = tuple(LayerInfo(il, "exps", 4, 1, 10, ()) for il in range(2))
    # Two experts of layer 0 get nine tenths of its tokens; layer 1 is even.
    popularity = np.array([[0.6, 0.05, 0.05, 0.3], [0.25] * 4], np.float32)
    profile = profiles.Profile([0, 1], popularity, np.zeros((1, 4, 4), np.float16), 10, {})
    assert hits.of_profile(profile, layers, "p").of([2, 2]) == pytest.approx((0.9 + 0.5) / 2)
    popularity[0] = 0.25
    assert hits.of_profile(profile, layers, "p").of([2, 2]) == hits.default(layers).of([2, 2])
    with pytest.raises(RotaryError, match="a profile of this model"):
        hits.of_profile(profile, layers[:1], "p")


# ---- named shapes


@pytest.mark.parametrize(
    ("name", "kind", "n_bytes", "source"),
    [
        ("mixtral-8x7b", "q8_0", 46.22 * 2**30, "llama.cpp pull request 4406"),
        ("mixtral-8x7b", "q4_0", 24.62 * 2**30, "llama.cpp pull request 4406, routers in F16"),
        ("mixtral-8x22b", "q4_k_m", 85.58e9, "huggingface.co/bartowski/Mixtral-8x22B-v0.1-GGUF"),
        ("qwen3-30b-a3b", "q4_k_m", 17.28 * 2**30, "llama-bench's size column, 30.53 B"),
        ("gpt-oss-20b", "mxfp4", 11.27 * 2**30, "llama-bench's size column, 20.91 B"),
        ("gpt-oss-120b", "mxfp4", 59.02 * 2**30, "llama-bench's size column, 116.83 B"),
        ("deepseek-v3", "q8_0", 713.29e9, "huggingface.co/bartowski/deepseek-ai_DeepSeek-V3-0324-GGUF"),
        ("deepseek-v3", "q4_k_m", 404.43e9, "huggingface.co/bartowski/deepseek-ai_DeepSeek-V3-0324-GGUF"),
    ],
)
def test_sizes_of_shapes_are_the_published_ones(name, kind, n_bytes, source):
    found = footprint.of_headers([shapes.header(name, kind)])
    assert found.weight_bytes == pytest.approx(n_bytes, rel=0.01), source


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 46.70), ("qwen3-30b-a3b", 30.53), ("qwen3-235b-a22b", 235.09), ("gpt-oss-20b", 20.91),
     ("gpt-oss-120b", 116.83), ("deepseek-v3", 671.03)],
)  # fmt: skip
def test_weights_of_shapes_are_as_many_as_llama_cpp_counts(name, billions):
    assert footprint.of_headers([shapes.header(name)]).n_params / 1e9 == pytest.approx(billions, abs=0.01)


def test_every_shape_of_every_type():
    for name, shape in shapes.SHAPES.items():
        for kind in shapes.TYPES:
            found = footprint.of_headers([shapes.header(name, kind)])
            assert len(found.layers) == shape.layers - shape.dense
            assert {(matrix.n_in, matrix.n_out) for matrix in found.matrices} == {
                (shape.embd, shape.ff), (shape.ff, shape.embd),
            }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "windows", "n_bytes"),
    [
        # 48 layers x 4 heads x 2 x 128 values x 2 bytes.
        ("qwen3-30b-a3b", True, 4096 * 48 * 4 * 2 * 128 * 2),
        # Latent attention: 576 values a layer, no values beside keys.
        ("deepseek-v3", True, 4096 * 61 * 576 * 2),
        # Every other layer sees 128 tokens: 128 + 512, in steps of 256.
        ("gpt-oss-120b", True, (18 * 4096 + 18 * 768) * 8 * 2 * 64 * 2),
        ("gpt-oss-120b", False, 36 * 4096 * 8 * 2 * 64 * 2),
    ],
)
def test_kv_cache(name, windows, n_bytes):
    assert footprint.of_headers([shapes.header(name)]).kv_bytes(4096, windows) == n_bytes


def test_kv_heads_of_each_layer_and_recurrent_layers():
    header = shapes.header("qwen3-30b-a3b")
    heads = [1] * 24 + [2] * 24
    found = footprint.of_headers(
        [replace(header, metadata={**header.metadata, "qwen3moe.attention.head_count_kv": heads})]
    )
    assert found.kv_bytes(10) == 10 * (24 + 48) * 2 * 128 * 2
    every_fourth = {**header.metadata, "qwen3moe.full_attention_interval": 4}
    assert len(footprint.of_headers([replace(header, metadata=every_fourth)]).cached) == 12


# ---- files


def test_a_file_reads_as_what_it_is(tiny_model):
    found = footprint.of_headers(read_shards(tiny_model))
    metadata = read_shards(tiny_model)[0].metadata
    assert found.n_layer == 6 and len(found.layers) == 6
    heads, width = metadata["qwen3moe.attention.head_count_kv"], metadata["qwen3moe.attention.key_length"]
    assert found.kv_bytes(100) == 100 * 6 * heads * width * 2 * 2
    # 4 of 32 experts are used, each of three matrices, with a multiplication and an addition per weight.
    assert found.expert_flops == 2 * 6 * 4 * sum(matrix.n_in * matrix.n_out for matrix in found.matrices)
    assert sum(matrix.n_bytes for matrix in found.matrices) == found.layers[0].expert_bytes
    assert found.heads == footprint.Heads(metadata["qwen3moe.attention.head_count"], heads, width, width)
    # The embeddings are the output matrix too, so that a token reads them all.
    assert found.token_bytes == found.resident_bytes < found.file_bytes - found.expert_bytes


def test_damaged_headers_end_in_one_line_with_little_work_and_memory(tiny_model, tmp_path):
    whole = tiny_model.read_bytes()
    header = read_shards(tiny_model)[0]
    start = min(tensor.offset for tensor in header.tensors)
    rng, path = random.Random(11), tmp_path / "damaged.gguf"
    refused = 0
    tracemalloc.start()
    try:
        for turn in range(120):
            data = bytearray(whole)
            if turn % 4 == 0:
                del data[rng.randrange(len(data)) :]
            for _ in range(rng.choice((1, 1, 8, 64))):
                at = rng.randrange(4, min(start, len(data) - 8)) if len(data) > 16 else 0
                data[at : at + 8] = rng.choice(
                    (rng.randbytes(8), struct.pack("<Q", 2**63), struct.pack("<Q", 2**20), bytes(8))
                )
            path.write_bytes(data)
            del data
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                with Calls() as calls:
                    found = plan.make(str(path), ram="8GiB", vram="0", n_ctx=64)
                    describe(found)
            except RotaryError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 600
            assert calls.n < 300_000, turn
            assert tracemalloc.get_traced_memory()[1] - before < 64 * MIB, turn
    finally:
        tracemalloc.stop()
    assert refused > 40


@pytest.mark.parametrize("at", [8, 16])
def test_a_hole_in_place_of_a_model_is_not_walked(tmp_path, at):
    # Zeros are valid entries of no size; a large sparse file has room for a billion of them.
    path = tmp_path / "hole.gguf"
    with path.open("wb") as file:
        head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
        head[at : at + 8] = struct.pack("<Q", 2**30)
        file.write(head)
        file.truncate(2**36)
    with Calls() as calls, pytest.raises(ModelError, match="damaged"):
        plan.make(str(path), ram="8GiB")
    assert calls.n < 300_000


def test_values_of_the_wrong_kind_are_named():
    header = shapes.header("qwen3-30b-a3b")
    for key, value in (
        ("block_count", [1, 2]), ("block_count", 2**31), ("attention.head_count_kv", "eight"),
        ("expert_used_count", 1.5), ("attention.key_length", -1), ("embedding_length", None),
    ):  # fmt: skip
        metadata = {**header.metadata, f"qwen3moe.{key}": value}
        with pytest.raises(ModelError, match=r"^\S+: .*; .*; \w+"):
            footprint.of_headers([replace(header, metadata=metadata)])


# ---- the machine


def test_what_is_said_counts_and_the_rest_is_published(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 5 * MIB)
    none = dict.fromkeys(("vram", "ram", "ram_rate", "vram_rate"))
    said = calibration.describe(**{**none, "vram": "24GiB"}, link="10GB/s", disk="auto")
    assert (said.vram_bytes, said.ram_bytes, said.link_rate) == (24 << 30, 5 * MIB, 10e9)
    assert said.sources["link"] == "given" and said.sources["disk"].startswith("published")
    with pytest.raises(RotaryError, match=r"disk 'fast'.*: not a rate|disk 'fast': not a rate"):
        calibration.describe(**{**none, "vram": "0"}, link="auto", disk="fast")
    monkeypatch.setattr(machine, "available_memory", lambda: None)
    with pytest.raises(RotaryError, match="give --ram"):
        calibration.describe(**{**none, "vram": "0"}, link="auto", disk="auto")


TICK_S = 2.0**-10


@pytest.fixture
def ticks(monkeypatch):
    """Replace the clock, so that whatever is measured takes one tick."""
    from rotary_llamacpp.native import ggml as _ggml
    from rotary_llamacpp.native import kernels as _kernels

    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * TICK_S)
    for module in (_ggml, _kernels, calibration):
        monkeypatch.setattr(module, "time", clock)


@pytest.mark.usefixtures("ticks")
def test_measuring_replaces_what_was_not_said(native, monkeypatch, tiny_model):
    from rotary_llamacpp.native import kernels as _kernels

    monkeypatch.setattr(disk, "read_cold", lambda path: disk.ColdRead(300 * MIB, 2.0, 0.5, "direct"))
    monkeypatch.setattr(calibration, "_COPY_BYTES", 8 * MIB)
    monkeypatch.setattr(_kernels, "_MATRIX_BYTES", MIB)
    found = footprint.of_headers(read_shards(tiny_model))
    measured = calibration.measure(HERE, found, Request(), tiny_model, 1, frozenset())
    assert measured.disk_rate == 150 * MIB and "tiny-moe" in measured.sources["disk"]
    assert measured.copy_rate == 8 * MIB / TICK_S
    assert HERE.ram_rate != measured.ram_rate > 0 and HERE.cpu_flops != measured.cpu_flops > 0
    assert measured.disk_cpu_s == 0.5 / (300 * MIB) / machine.cpu_count()
    n_layers, n_tokens = 16, Request().micro_batch  # that one graph computes
    assert 0 < measured.cpu_layer_s < TICK_S / n_layers, "but for reading the KV cache"
    assert measured.cpu_prompt_layer_s == TICK_S / n_tokens
    assert "Q8_0" in measured.sources["ram rate"]
    kept = calibration.measure(HERE, found, Request(), tiny_model, 1, frozenset(("disk", "ram rate")))
    assert (kept.disk_rate, kept.ram_rate, kept.copy_rate) == (HERE.disk_rate, HERE.ram_rate, HERE.copy_rate)


def test_all_cpus_that_may_be_used_are_measured(monkeypatch, tiny_model):
    monkeypatch.setattr(plan, "cpu_count", lambda: 3)
    monkeypatch.setattr(calibration, "measure", lambda here, *rest: here)
    assert plan.make(str(tiny_model), ram="8GiB", vram="0", measure=True).case.threads == 3
    assert plan.make(str(tiny_model), ram="8GiB", vram="0", measure=True, threads=2).case.threads == 2
    assert plan.make(str(tiny_model), ram="8GiB", vram="0").case.threads is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("can't start new thread")]
)
def test_a_disk_that_cannot_be_measured_is_as_published(native, monkeypatch, tiny_model, error):
    def refuse(path):
        raise error

    monkeypatch.setattr(disk, "measure", refuse)
    found = footprint.of_headers(read_shards(tiny_model))
    described = replace(HERE, sources={"disk": "published, NVMe"})
    measured = calibration.measure(described, found, Request(), None, 1, frozenset(("ram rate",)))
    assert (measured.disk_rate, measured.disk_cpu_s) == (HERE.disk_rate, 0.0)
    said = measured.sources["disk"]
    assert said == f"published, NVMe; not measured: {error}"


def test_vram_is_what_is_free(native, monkeypatch):
    gpus = {"CUDA0": (10 * MIB, 24 * MIB), "CUDA1": (24 * MIB, 24 * MIB), "CPU": (7, 7)}
    monkeypatch.setattr(_native.Library, "device_memory", lambda self, inner: gpus[inner])
    monkeypatch.setattr(native, "default_inner", ["CUDA0", "CUDA1", "CPU"])
    arguments = {**dict.fromkeys(("ram_rate", "vram_rate")), "ram": "8GiB", "link": "auto", "disk": "auto"}
    found = calibration.describe(vram=None, **arguments)
    assert (found.vram_bytes, found.vram_total) == (34 * MIB, 48 * MIB)
    assert found.sources["vram"] == "free of 48.0 MiB on this machine"
    # If a device does not report its free memory, all of it counts, and the source says so.
    gpus["CUDA0"] = (0, 24 * MIB)
    found = calibration.describe(vram=None, **arguments)
    assert found.vram_bytes == 48 * MIB and "does not say what is free" in found.sources["vram"]
    found = calibration.describe(vram="12GiB", **arguments)
    assert (found.vram_bytes, found.sources["vram"]) == (12 << 30, "given")
    monkeypatch.setattr(native, "default_inner", ["CPU"])
    found = calibration.describe(vram=None, **arguments)
    assert found.vram_bytes == 0 and "no GPU" in found.sources["vram"]


def test_memory_of_a_device(native):
    free, total = native.device_memory("CPU")
    assert 0 < free <= total
    assert native.device_memory("NOSUCH0") == (0, 0)


@pytest.mark.usefixtures("ticks")
def test_measuring_a_gpu(native, monkeypatch, tiny_model):
    # The CPU stands for the GPU: ggml's functions are the same, by the device's name.
    from rotary_llamacpp.native import kernels as _kernels

    monkeypatch.setattr(disk, "read_cold", lambda path: disk.ColdRead(300 * MIB, 2.0, 0.5, "direct"))
    monkeypatch.setattr(calibration, "_COPY_BYTES", 8 * MIB)
    monkeypatch.setattr(_kernels, "_LINK_BYTES", 8 * MIB)
    monkeypatch.setattr(_kernels, "_MATRIX_BYTES", MIB)
    found = footprint.of_headers(read_shards(tiny_model))
    with_vram = replace(HERE, vram_bytes=1 << 30, sources={"link": "published"})
    elsewhere = calibration.measure(with_vram, found, Request(), tiny_model, 1, frozenset())
    assert elsewhere.vram_rate == HERE.vram_rate and "no GPU here" in elsewhere.sources["link"]
    monkeypatch.setattr(calibration, "_gpu", lambda: "CPU")
    measured = calibration.measure(with_vram, found, Request(), tiny_model, 1, frozenset())
    assert measured.link_rate == 8 * MIB / TICK_S and HERE.vram_rate != measured.vram_rate > 0
    assert measured.gpu_layer_s > 0 and measured.gpu_prompt_layer_s == TICK_S / Request().micro_batch
    assert measured.sources["link"] == "measured: copies to CPU"
    said = calibration.measure(with_vram, found, Request(), tiny_model, 1, frozenset(("link", "vram rate")))
    assert (said.link_rate, said.vram_rate) == (HERE.link_rate, HERE.vram_rate)


def test_a_device_that_is_not_there(native):
    from rotary_llamacpp.native import kernels as _kernels

    with pytest.raises(RotaryError, match="no device CUDA7"):
        _kernels.measure_link("CUDA7")


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize("kind", ["Q4_0", "MXFP4", "Q6_K", "F16"])
def test_kernels_of_types_can_be_timed(native, monkeypatch, kind):
    from rotary_llamacpp.native import kernels as _kernels

    monkeypatch.setattr(_kernels, "_READ_BYTES", MIB)
    matrices = _kernels.Matrices(kind, 256, 64, 8, 2, 16)
    rates = _kernels.measure(matrices, threads=1)
    # A graph has as many nodes, each reading 2 of 16 matrices, as make 1 MiB, but at most 256.
    token_bytes = 2 * 64 * matrices.row_bytes
    assert rates.token_rate == min(MIB // token_bytes, 256) * token_bytes / TICK_S
    assert rates.prompt_flops == 512 * 2 * 2 * 256 * 64 / TICK_S
    assert rates.fill_rate == 16 * 64 * matrices.row_bytes / TICK_S


@pytest.mark.usefixtures("ticks")
def test_experts_of_two_types_are_timed_as_they_are(native, monkeypatch):
    # Rows of 96 are not blocks of 256, so that their type is another.
    from rotary_llamacpp.native import kernels as _kernels

    narrow = shapes.Shape("qwen3moe", 2, 256, 8, 2, 32, 96, 16, 4, 1000, 512)
    monkeypatch.setitem(shapes.SHAPES, "narrow", narrow)
    monkeypatch.setattr(_kernels, "_MATRIX_BYTES", MIB)
    monkeypatch.setattr(calibration, "_COPY_BYTES", 8 * MIB)
    found = footprint.of_headers([shapes.header("narrow", "q4_k")])
    assert [matrix.type_name for matrix in found.matrices] == ["Q4_K", "Q4_K", "Q5_0"]
    # Layers without attention have no heads.
    found = replace(found, heads=footprint.Heads(8, 0, 0, 0))
    measured = calibration.measure(HERE, found, Request(), None, 1, frozenset(("disk",)))
    assert measured.sources["ram rate"].startswith("measured: ggml's Q4_K, Q5_0, ")
    assert measured.ram_rate > 0 and measured.cpu_flops > 0


def test_a_gpu_is_found_whatever_vram_was_said(monkeypatch):
    library = type("Library", (), {"default_inner": ["CUDA0"]})
    monkeypatch.setattr(_native, "loaded", lambda: None)
    monkeypatch.setattr(_native, "load", lambda: library)
    assert calibration._gpu() == "CUDA0"


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize(("n_tokens", "n_layers"), [(1, 16), (512, 1)])
@pytest.mark.parametrize(
    "shape",
    [
        (256, 8, 2, 32, 32, 16, 4, 64, 512),
        (64, 4, 1, 96, 64, 1, 1, 128, 256),
        (64, 2, 2, 31, 16, 8, 1, 9, 256),
    ],
)
def test_the_rest_of_layers_can_be_timed(native, shape, n_tokens, n_layers):
    from rotary_llamacpp.native import kernels as _kernels

    seconds = _kernels.measure_layer(_kernels.LayerShape(*shape), n_tokens, threads=1)
    assert seconds == TICK_S / n_layers


# ---- the command


def test_plan_of_a_file(native, tiny_model, rotary_command):
    ran = rotary_command("plan", tiny_model, "--ram", "8GiB", "--vram", "0")
    assert ran.returncode == 0 and ran.stderr == ""
    assert "do not use Rotary here: everything fits into memory" in ran.stdout
    assert f"llama-cli -m {tiny_model} -ngl 0" in ran.stdout


def test_plan_of_a_shape_as_json(rotary_command):
    ran = rotary_command(
        "plan", "qwen3-30b-a3b", "--vram", "12GiB", "--ram", "64GiB", "--json", ROTARY_LIBRARY="/no/such.so"
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert set(found) == {"model", "machine", "request", "hit_rate_source", "options", "recommendation"}
    assert set(found["model"]) >= {"name", "n_params", "expert_bytes", "resident_bytes", "kv_bytes"}
    assert found["machine"]["sources"]["link"] == "published, PCIe 4 x16"
    assert [option["key"] for option in found["options"]] == [
        "resident", "op-offload", "cpu-experts", "rotary-gpu", "cpu", "rotary-cpu",
    ]  # fmt: skip
    numbers = {
        "key": str, "name": str, "command": str, "problem": str, "store": str, "vram_bytes": int,
        "ram_bytes": int, "budget_bytes": int | None, "n_slots": list, "hit_rate": float | None,
        "uniform_hit_rate": float | None, "decode_tokens_per_second": float | None,
        "decode_limit": str | None, "decode_seconds": dict | None,
        "prefill_tokens_per_second": float | None, "prefill_limit": str | None,
        "prefill_seconds": dict | None,
    }  # fmt: skip
    for option in found["options"]:
        assert set(option) == set(numbers)
        for name, kind in numbers.items():
            assert isinstance(option[name], kind), (option["key"], name)
        assert (option["problem"] == "") == (option["decode_limit"] is not None)
    assert found["options"][3]["n_slots"][0] > 8 and found["recommendation"]["uses_rotary"] is True
    assert found["recommendation"]["command"].startswith("rotary run qwen3-30b-a3b-q4_k_m.gguf")


def test_names_in_capitals():
    assert shapes.header("GPT-OSS-20B", "Q4_K_M").path.name == "gpt-oss-20b-q4_k_m.gguf"


def test_plan_by_a_trace(native, tiny_model, tmp_path, rotary_command):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("In the beginning\n")
    trace = tmp_path / "tiny.trace"
    assert rotary_command("trace", tiny_model, "--prompts", prompts, "-o", trace, "-n", 8).returncode == 0
    arguments = ("plan", tiny_model, "--ram", "8GiB", "--budget", "25%", "--json")
    replayed = json.loads(rotary_command(*arguments, "--trace", trace).stdout)
    by_curve = json.loads(rotary_command(*arguments).stdout)
    assert "replayed" in replayed["hit_rate_source"] and "default curve" in by_curve["hit_rate_source"]
    one, other = (found["options"][-1] for found in (replayed, by_curve))
    assert one["n_slots"] == other["n_slots"] == [8] * 6 and one["hit_rate"] != other["hit_rate"]


def test_plot(native, rotary_command, tmp_path):
    out = tmp_path / "plan.svg"
    ran = rotary_command("plan", "qwen3-30b-a3b", "--vram", "12GiB", "--ram", "64GiB", "--plot", out)
    assert ran.returncode == 0, ran.stderr
    from xml.etree import ElementTree

    figure = ElementTree.parse(out).getroot()
    words = [element.text for element in figure.iter("{http://www.w3.org/2000/svg}text")]
    assert "Rotary on the GPU" in words and "stock: all on the CPU, mapped" in " ".join(map(str, words))
    assert "decode, tokens per second" in words
    assert any(str(word).startswith("VRAM for experts, GiB") for word in words)
    once = out.read_bytes()
    ran = rotary_command("plan", "qwen3-30b-a3b", "--vram", "12GiB", "--ram", "64GiB", "--plot", out)
    assert ran.returncode == 0 and out.read_bytes() == once
    lines = [each for each in figure.iter() if each.get("id", "").startswith("line2d")]
    assert len(lines) > 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("no-such-shape",), "neither a file nor a known shape"),
        (("no-such.gguf",), "no such file"),
        (("deepseek-v3", "--vram", "much"), "size 'much'"),
        (("deepseek-v3", "--vram", "24"), "size '24': is only 24 bytes; a size needs a unit; write 24GiB"),
        (("deepseek-v3", "--link", "wire"), "link 'wire': not a rate"),
        (("deepseek-v3", "--type", "q3"), "type 'q3' is not known"),
        (("deepseek-v3", "--ctx", "100", "--prompt", "90", "--answer", "20"), "do not fit"),
        (("deepseek-v3", "--budget", "much"), "budget 'much'"),
        (("deepseek-v3", "--plot", "plan.png"), "give a name that ends in .svg"),
        (("deepseek-v3", "--trace", "a", "--profile", "b"), "a trace and a profile"),
    ],
)
def test_bad_input_is_one_line(rotary_command, arguments, says):
    ran = rotary_command("plan", *arguments, "--ram", "64GiB")
    assert ran.returncode == 2 and ran.stdout == ""
    assert says in ran.stderr and ran.stderr.count("\n") == 1 and "Traceback" not in ran.stderr
