# SPDX-License-Identifier: MIT
"""Conversions that change types: their results, and requests that are refused."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from rotary_llamacpp.conversion import quantising
from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.conversion.quantising import Wish
from rotary_llamacpp.errors import ModelError, RotaryError
from rotary_llamacpp.gguf_files import imatrices
from rotary_llamacpp.gguf_files.header import read_header
from tests.support import no_hang, write_all
from tests.support.conversions import MIB, SHAPE, assert_nothing_else, fields_of, tensor_bytes, write_legacy

pytestmark = pytest.mark.model


def test_experts_and_the_rest_are_quantised_apart(synthetic, tmp_path, stock_trace):
    model = synthetic(type="f16", **SHAPE)
    said: list[str] = []
    wish = Wish("Q3_K", "q8_0", (r"blk\.0\..*_exps=Q6_K",))
    (out,) = convert(model, tmp_path / "out.gguf", Options(wish=wish, verify=True), say=said.append)
    assert_nothing_else(tmp_path, out)
    kinds = {tensor.name: tensor.type_name for tensor in read_header(out).tensors}
    assert {kinds[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q6_K"}
    assert {kinds[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q3_K"}
    assert kinds["blk.1.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32", "routers stay as they are"
    # The plan printed beforehand agrees with the result.
    assert f"{out.stat().st_size / 2**20:.1f} MiB in 1 file" in said[0] and "3 tensors F16 -> Q3_K" in said[0]
    assert read_header(out).metadata["general.file_type"] == 12  # MOSTLY_Q3_K_M
    unchanged = {"general.file_type", "general.quantization_version"}
    before, after = fields_of(model), fields_of(out)
    assert {k: v for k, v in after.items() if k not in unchanged} == {
        k: v for k, v in before.items() if k not in unchanged
    }
    assert np.isfinite(stock_trace(out, n_prompt=40)["logits"]).all()


def test_what_is_not_named_keeps_its_bytes(tiny_model, tmp_path):
    """The source has an alignment of 4096, with which llama.cpp's quantiser writes files it cannot read."""
    (aligned,) = convert(tiny_model, tmp_path / "aligned.gguf")
    wish = Wish(types=(r"blk\.2\..*_exps=Q4_0",))
    (out,) = convert(aligned, tmp_path / "out.gguf", Options(wish=wish))
    before, after = tensor_bytes([read_header(tiny_model)]), tensor_bytes([read_header(out)])
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"blk.2.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
    assert {after[name][1] for name in changed} == {"Q4_0"}


def test_legacy_layouts_are_quantised_alike(synthetic, tmp_path):
    model = synthetic("test-llama", type="q8_0", layers=2, experts=12, used=2)
    legacy = tmp_path / "legacy.gguf"
    write_legacy(model, legacy)
    options = Options(wish=Wish("Q4_0"))
    one, other = (convert(path, tmp_path / f"{path.stem}-q.gguf", options)[0] for path in (model, legacy))
    assert tensor_bytes([read_header(one)]) == tensor_bytes([read_header(other)])


# ---- importance matrices -----------------------------------------------------------------------------


def write_imatrix(path: Path, shapes: Mapping[str, tuple[int, int]], seed: int = 0) -> Path:
    """Write a random importance matrix; `shapes` has the columns and experts of each tensor."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for name, (n_columns, n_expert) in shapes.items():
        sums = rng.uniform(0.1, 9, (n_expert, n_columns)).astype(np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.full((n_expert, 1), 4, np.float32))
    write_all(writer)
    return path


def experts_of(model: Path) -> dict[str, tuple[int, int]]:
    tensors = read_header(model).tensors
    return {tensor.name: (tensor.shape[0], tensor.shape[2]) for tensor in tensors if "_exps" in tensor.name}


def test_an_importance_matrix_is_heeded(synthetic, tmp_path):
    model = synthetic(type="f16", **SHAPE | {"layers": 1, "experts": 2})
    wish = Wish("IQ3_XXS")
    with pytest.raises(RotaryError, match="needs an importance matrix"):
        convert(model, tmp_path / "out.gguf", Options(wish=wish))
    results = []
    for seed in range(2):
        path = write_imatrix(tmp_path / f"{seed}.imatrix", experts_of(model), seed)
        values = imatrices.load(str(path))["blk.0.ffn_down_exps.weight"]
        assert len(values) == 2 * 256 and values.max() < 9 / 4 + 1e-6
        said: list[str] = []
        options = Options(wish=replace(wish, imatrix=str(path)))
        (out,) = convert(model, tmp_path / f"{seed}.gguf", options, say=said.append)
        assert "importance matrix for 3 of 3 tensors" in said[0]
        results.append(tensor_bytes([read_header(out)])["blk.0.ffn_down_exps.weight"])
    assert results[0][1] == "IQ3_XXS" and results[0][2] != results[1][2]
    with pytest.raises(RotaryError, match="not an importance matrix"):
        convert(model, tmp_path / "no.gguf", Options(wish=replace(wish, imatrix=str(model))))


@pytest.mark.parametrize(
    ("kind", "columns", "text"),
    [
        ("Q4_0", None, "has none of the 18 tensors that change"),
        ("Q4_0", (256, 31), "7936 values for blk.5.ffn_up_exps.weight, which has 8192"),
        ("IQ2_S", (), "no values for blk.5.ffn_up_exps.weight, which IQ2_S needs"),
    ],
)
def test_importance_matrices_that_do_not_fit(tiny_model, tmp_path, kind, columns, text):
    """The mismatch is found before anything is quantised."""
    shapes = experts_of(tiny_model)
    del shapes["blk.5.ffn_up_exps.weight"]
    if columns is None:
        shapes = {"blk.0.of_another_model.weight": (256, 32)}
    elif columns:
        shapes["blk.5.ffn_up_exps.weight"] = columns
    imatrix = write_imatrix(tmp_path / "imatrix", shapes)
    options = Options(wish=Wish(kind, imatrix=str(imatrix)))
    with pytest.raises(RotaryError, match=text):
        convert(tiny_model, tmp_path / "out.gguf", options, dry_run=True)
    assert_nothing_else(tmp_path, imatrix)


# ---- what cannot be ----------------------------------------------------------------------------------


def test_a_quantiser_that_fails_leaves_nothing(tiny_model, tmp_path):
    wish = Wish(types=("(?P<x>_exps)=Q4_0",))  # no such groups in C++
    with pytest.raises(ModelError, match="not quantised"):
        convert(tiny_model, tmp_path / "out.gguf", Options(wish=wish))
    broken = tmp_path / "unknown.gguf"
    broken.write_bytes(tiny_model.read_bytes().replace(b"qwen3moe", b"qwen3mow"))
    with pytest.raises(ModelError, match="unknown model architecture"):
        convert(broken, tmp_path / "out.gguf", Options(wish=Wish("Q4_0")))
    assert_nothing_else(tmp_path, broken)


def test_a_quantiser_that_aborts_ends(tiny_model, tmp_path, monkeypatch):
    """With ggml's backtrace the quantiser would wait for ever, while a forked child holds its output open."""
    monkeypatch.setitem(quantising.TYPES, "Q8_1", 9)
    wish = Wish("Q4_0", types=(r"blk\.5\.ffn_up_exps=Q8_1",))
    with no_hang(), pytest.raises(ModelError, match=r"not quantised, .*GGML_ASSERT|status -6"):
        convert(tiny_model, tmp_path / "out.gguf", Options(wish=wish))
    assert_nothing_else(tmp_path)


def test_a_disk_that_gets_full_while_quantising(tiny_model, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, before[1]))
    try:
        with pytest.raises(RotaryError, match=r"quantised\.part: cannot be written, .*free some space"):
            convert(tiny_model, tmp_path / "out.gguf", Options(wish=Wish("Q4_0")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_nothing_else(tmp_path)


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        *((Wish("Q4_0", rest=kind), f"type '{kind}': not a type") for kind in ("Q8_1", "Q8_K", "I8")),
        (Wish("Q4_0", types=("nothing here=Q4_0",)), "'nothing here' matches no tensor"),
        (Wish(imatrix="none"), "an importance matrix is for quantising"),
    ],
)
def test_wishes_that_are_refused(tiny_model, tmp_path, wish, text):
    for dry_run in (True, False):
        with pytest.raises(RotaryError, match=text):
            convert(tiny_model, tmp_path / "out.gguf", Options(wish=wish), dry_run=dry_run)
    assert_nothing_else(tmp_path)


def test_nothing_is_quantised_that_has_the_type(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(quantising, "quantise", lambda *_: pytest.fail("it was quantised"))
    said: list[str] = []
    (out,) = convert(tiny_model, tmp_path / "out.gguf", Options(wish=Wish("Q8_0")), say=said.append)
    assert "no tensor changes" in said[0]
    assert tensor_bytes([read_header(out)]) == tensor_bytes([read_header(tiny_model)])
