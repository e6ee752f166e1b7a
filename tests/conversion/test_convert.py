# SPDX-License-Identifier: MIT
"""Conversion from end to end: what the result contains, and that stock llama.cpp computes the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gguf import GGUFReader

from rotary_llamacpp.conversion.convert import HISTORY_KEY, Options, convert
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.gguf_files.fields import array_strings, raw_fields
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.gguf_files.info import ModelInfo, read_shards
from rotary_llamacpp.traces import profiles
from tests.support.conversions import SHAPE, assert_nothing_else, fields_of, tensor_bytes, write_legacy
from tests.support.paged import assert_equal, paged_trace

# ---- what the result holds ---------------------------------------------------------------------------


def test_experts_are_together_and_aligned_and_all_else_is_kept(tiny_model, tmp_path):
    said: list[str] = []
    (out,) = convert(tiny_model, tmp_path / "out.gguf", Options(verify=True), say=said.append)
    assert_nothing_else(tmp_path, out)
    header = read_header(out)
    assert header.alignment == 4096 and all(tensor.offset % 4096 == 0 for tensor in header.tensors)
    names = [tensor.name for tensor in header.tensors]
    first = next(i for i, name in enumerate(names) if "_exps" in name)
    assert all("_exps" in name for name in names[first:]), "what is resident is in front"
    layers = [int(name.split(".")[1]) for name in names[first:]]
    assert layers == sorted(layers)
    by_offset = sorted(header.tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(by_offset):
        assert 0 <= after.offset - before.offset - before.n_bytes < 4096
    assert tensor_bytes([header]) == tensor_bytes([read_header(tiny_model)])
    assert fields_of(out) == fields_of(tiny_model)
    assert said[-1].startswith("verified: 74 tensors")
    # Experts of 34816 bytes are 8.5 pages: none can both begin and end at a page.
    assert "0 of 576 expert matrices are whole pages" in said[0] and "576 are 34816 bytes" in said[0]


def test_ggufs_own_reader_agrees(tiny_model, tmp_path):
    (out,) = convert(tiny_model, tmp_path / "out.gguf")
    ours, theirs = GGUFReader(out), GGUFReader(tiny_model)
    assert ours.get_field("general.alignment").contents() == 4096
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert (
                ours.get_field(name).types == field.types
                and ours.get_field(name).contents() == field.contents()
            )


@pytest.mark.model
@pytest.mark.parametrize("options", [Options(), Options(split_bytes=4_000_000), Options(alignment=32)])
def test_stock_computes_the_same(tiny_model, tmp_path, stock_trace, options):
    first, *_ = convert(tiny_model, tmp_path / "out.gguf", options)
    assert_equal(stock_trace(first, n_prompt=40), stock_trace(tiny_model, n_prompt=40))


@pytest.mark.model
@pytest.mark.parametrize("store", ["mmap", "direct"])
def test_paging_computes_the_same(native, synthetic, tmp_path, stock_trace, store):
    model = synthetic(type="q4_0", **SHAPE)
    (out,) = convert(model, tmp_path / "out.gguf")
    paged, stats = paged_trace(out, 40, {"budget": "50%", "store": store})
    assert_equal(paged, stock_trace(model, n_prompt=40))
    assert stats["misses"] > 0


def test_split_merged_and_split_again_are_equal(synthetic, tmp_path):
    model = synthetic(type="q8_0", **SHAPE)
    split = Options(split_bytes=1_000_000)
    first = convert(model, tmp_path / "first.gguf", split)
    (merged,) = convert(first[0], tmp_path / "merged.gguf")
    second = convert(merged, tmp_path / "second.gguf", split)
    assert len(first) == len(second) > 3
    assert [path.name for path in first[:2]] == [
        f"first-{i:05d}-of-{len(first):05d}.gguf" for i in (1, 2)
    ]  # fmt: skip
    whole = [tensor_bytes(read_shards(path)) for path in (model, first[0], merged, second[0])]
    assert whole[0] == whole[1] == whole[2] == whole[3]
    for one, other in zip(first, second, strict=True):
        a, b = read_header(one), read_header(other)
        assert tensor_bytes([a]) == tensor_bytes([b])
        assert one.stat().st_size <= 1_000_000 or len(a.tensors) == 1
        assert a.alignment == 4096 and a.metadata["split.count"] == len(first)
        assert a.metadata["split.tensors.count"] == len(whole[0])
    assert "split.no" not in read_header(merged).metadata
    assert fields_of(merged) == fields_of(first[0]) == fields_of(model)
    history = array_strings(raw_fields(read_header(second[0]))[HISTORY_KEY], HISTORY_KEY)
    assert len(history) == 3 and f"in {len(first)} files" in history[1]
    # And back to the default alignment, as llama.cpp writes files.
    (plain,) = convert(merged, tmp_path / "plain.gguf", Options(alignment=32))
    assert read_header(plain).alignment == 32 and tensor_bytes([read_header(plain)]) == whole[0]


def test_experts_one_tensor_each_are_joined(synthetic, tmp_path, stock_trace):
    model = synthetic("test-llama", type="q8_0", layers=2, experts=12, used=2)
    legacy = tmp_path / "legacy.gguf"
    write_legacy(model, legacy)
    assert not ModelInfo.read(legacy).is_moe
    said: list[str] = []
    (out,) = convert(legacy, tmp_path / "out.gguf", say=said.append)
    assert "6 of them joined from one tensor per expert" in said[0]
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(model)])
    assert ModelInfo.read(out).layers == ModelInfo.read(model).layers
    # Stock no longer loads the old layout, so the reference is the model it was made from.
    assert_equal(stock_trace(out, n_prompt=40), stock_trace(model, n_prompt=40))


def test_fused_gate_and_up_stay_fused(synthetic, tmp_path, stock_trace):
    model = synthetic("test-shared", type="q8_0", layers=2, fused=True)
    (out,) = convert(model, tmp_path / "out.gguf")
    assert any("ffn_gate_up_exps" in tensor.name for tensor in read_header(out).tensors)
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(model)])
    assert_equal(stock_trace(out, n_prompt=40), stock_trace(model, n_prompt=40))


def test_dense_models_are_only_aligned(dense_model, tmp_path):
    said: list[str] = []
    (out,) = convert(dense_model, tmp_path / "out.gguf", say=said.append)
    assert "dense model" in said[0]
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(dense_model)])


# ---- what is stored ----------------------------------------------------------------------------------


def test_a_profile_travels_in_the_model(native, tiny_model, tmp_path):
    model = tmp_path / "model.gguf"
    model.symlink_to(tiny_model)
    popularity = np.zeros((6, 32), np.float32)
    popularity[:, :8] = np.arange(8, 0, -1) / 8
    pairs = np.zeros((5, 32, 32), np.float16)
    profiles.Profile(list(range(6)), popularity, pairs, 100, {"of": "a test"}).save(profiles.beside(model))
    (out,) = convert(model, tmp_path / "out.gguf")
    (again,) = convert(out, tmp_path / "again.gguf")
    for path in (out, again):
        found = profiles.stored(path)
        assert found and found.about == {"of": "a test"} and found.ranked(3) == list(range(8))
        assert (found.pairs == pairs).all()
    _, stats = paged_trace(again, 8, {"budget": "25%"})
    assert stats["profile"] == str(again) and stats["notices"] == []
    (without,) = convert(out, tmp_path / "without.gguf", Options(profile="off"))
    assert profiles.stored(without) is None
    with pytest.raises(RotaryError, match="not a profile"):
        convert(out, tmp_path / "no.gguf", Options(profile=str(tiny_model)))


# ---- the command -------------------------------------------------------------------------------------


def test_command(rotary_command, tiny_model, tmp_path):
    out = tmp_path / "out.gguf"
    ran = rotary_command("convert", tiny_model, out, "--dry-run", "--split-size", "8MB")
    assert ran.returncode == 0 and "in 3 files" in ran.stdout and not list(tmp_path.iterdir())
    ran = rotary_command("convert", tiny_model, out, "--verify")
    assert ran.returncode == 0 and ran.stdout.strip() == str(out) and "verified" in ran.stderr
    ran = rotary_command("convert", tiny_model, out)
    assert ran.returncode == 2 and "exists; give --force" in ran.stderr
    assert rotary_command("convert", tiny_model, out, "--force").returncode == 0
    for options, text in (
        (["--experts", "Q3_K_M"], "type 'Q3_K_M': not a type"),
        (["--type", "(=Q8_0"], "regular expression"),
        (["--type", "Q8_0"], "PATTERN=TYPE"),
        (["--alignment", "48"], "powers of two"),
        (["--split-size", "many"], "not a number of bytes"),
    ):
        ran = rotary_command("convert", tiny_model, tmp_path / "no.gguf", *options)
        assert (ran.returncode, ran.stderr.count("\n")) == (2, 1) and text in ran.stderr, options
    assert_nothing_else(tmp_path, out)
