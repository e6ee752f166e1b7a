# SPDX-License-Identifier: MIT
"""ModelInfo, from headers alone: compared with the shapes that the generator was given."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from rotary_llamacpp.errors import ModelError
from rotary_llamacpp.gguf_files.info import ModelInfo
from rotary_llamacpp.planning import shapes
from tests.support import ROOT, write_all
from tests.support.processes import python


def test_tiny_model(tiny_model):
    info = ModelInfo.read(tiny_model)
    assert (info.architecture, info.n_layer, info.n_expert, info.n_expert_used) == ("qwen3moe", 6, 32, 4)
    assert [layer.il for layer in info.layers] == list(range(6))
    assert info.expert_bytes == sum(32 * layer.expert_bytes for layer in info.layers)
    assert info.min_budget_bytes == sum(4 * layer.expert_bytes for layer in info.layers)
    assert info.expert_bytes < info.file_bytes == tiny_model.stat().st_size
    assert 0 < info.resident_bytes < info.file_bytes - info.expert_bytes


@pytest.mark.parametrize(
    ("shape", "options", "n_tensors"),
    [
        ("test", {"type": "q4_0"}, 3),
        ("test-gpt-oss", {"type": "q8_0"}, 3),
        ("test-shared", {"fused": True}, 2),
    ],
)
def test_bytes_per_expert_by_architecture(synthetic, shape, options, n_tensors):
    info = ModelInfo.read(synthetic(shape, **options))
    block_bytes = 34 if options.get("type") == "q8_0" else 18
    # gate, up and down have 256 x 256 weights each; fused gate_up is two of them in one tensor.
    assert info.layers[0].expert_bytes == 3 * 256 * 256 // 32 * block_bytes
    names = [tensor.name for tensor in _tensors(info.files[0]) if tensor.name.startswith("blk.0.")]
    assert sum("_exps.weight" in name for name in names) == n_tensors and info.is_moe


def test_mixed_types_differ_by_layer(synthetic):
    info = ModelInfo.read(synthetic(type="q4_k_m"))
    assert {layer.types for layer in info.layers} == {("Q4_K",), ("Q4_K", "Q6_K")}
    assert len(info.describe().splitlines()) > 5, "unlike layers have lines of their own"


def test_shards_count_together(synthetic):
    whole, split = ModelInfo.read(synthetic(type="q8_0")), ModelInfo.read(synthetic(type="q8_0", shards=3))
    assert len(split.files) == 3
    assert split.layers == whole.layers
    assert split.resident_bytes == whole.resident_bytes
    assert split.file_bytes == sum(file.stat().st_size for file in split.files)


def test_missing_and_wrong_shards(synthetic, tmp_path):
    shards = ModelInfo.read(synthetic(type="q8_0", shards=3)).files
    for shard in shards[:2]:
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(ModelError, match="00003-of-00003"):
        ModelInfo.read(tmp_path / shards[0].name)
    with pytest.raises(ModelError, match="shard 2 of 3"):
        ModelInfo.read(shards[1])
    third = tmp_path / shards[2].name
    third.write_bytes(shards[1].read_bytes())
    with pytest.raises(ModelError, match=r"split\.no is 1, 2 is expected"):
        ModelInfo.read(tmp_path / shards[0].name)
    other = ModelInfo.read(synthetic(type="q8_0", shards=3, layers=2)).files
    third.write_bytes(other[2].read_bytes())
    with pytest.raises(ModelError, match=r"tensors in 3 shards, .* are expected"):
        ModelInfo.read(tmp_path / shards[0].name)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(shards[0].read_bytes())
    with pytest.raises(ModelError, match="rename"):
        ModelInfo.read(renamed)


def test_dense_model(dense_model):
    info = ModelInfo.read(dense_model)
    assert not info.is_moe
    assert info.min_budget_bytes == info.expert_bytes == 0
    assert "paging does not apply" in info.describe()


def test_expert_counts_per_layer_chunk_experts_and_companions(tmp_path):
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "grovemoe")
    writer.add_block_count(2)
    writer.add_array("grovemoe.expert_used_count", [2, 3])
    for il, n_expert in ((0, 4), (1, 8)):
        writer.add_tensor(f"blk.{il}.ffn_up_exps.weight", np.zeros((n_expert, 2, 32), np.float32))
        writer.add_tensor(f"blk.{il}.ffn_up_exps.bias", np.zeros((n_expert, 2), np.float32))
        writer.add_tensor(f"blk.{il}.ffn_down_exps.scale", np.zeros(n_expert, np.float32))
        writer.add_tensor(f"blk.{il}.ffn_up_shexp.weight", np.zeros((2, 32), np.float32))
    writer.add_tensor("blk.1.ffn_up_chexps.weight", np.zeros((2, 4, 32), np.float32))
    write_all(writer)
    info = ModelInfo.read(path)
    found = [
        (layer.il, layer.kind, layer.n_expert, layer.n_expert_used, layer.expert_bytes)
        for layer in info.layers
    ]
    # There are 2 chunk experts of 4 x 32 floats, so that at most 2 are used. Biases and scales stay resident.
    assert found == [(0, "exps", 4, 2, 256), (1, "chexps", 2, 2, 512), (1, "exps", 8, 3, 256)]
    assert info.min_budget_bytes == 2 * 256 + 2 * 512 + 3 * 256


def test_disagreeing_expert_tensors_are_refused(tmp_path):
    path = tmp_path / "odd.gguf"
    writer = GGUFWriter(path, "qwen3moe")
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((4, 2, 32), np.float32))
    writer.add_tensor("blk.0.ffn_down_exps.weight", np.zeros((5, 2, 32), np.float32))
    write_all(writer)
    with pytest.raises(ModelError, match="layer 0"):
        ModelInfo.read(path)


def test_layers_that_predict_several_tokens_are_not_loaded():
    header = shapes.header("qwen3-30b-a3b")
    whole = ModelInfo.of([header])
    found = ModelInfo.of([replace(header, metadata={**header.metadata, "qwen3moe.nextn_predict_layers": 1})])
    assert (whole.n_layer, found.n_layer) == (48, 47) and found.layers == whole.layers[:-1]
    last = sum(tensor.n_bytes for tensor in header.tensors if tensor.name.startswith("blk.47."))
    assert found.resident_bytes + found.expert_bytes == whole.resident_bytes + whole.expert_bytes - last


def test_to_dict_is_json(tiny_model):
    plain = json.loads(json.dumps(ModelInfo.read(tiny_model).to_dict()))
    assert plain["layers"][5]["layer_bytes"] == 32 * plain["layers"][5]["expert_bytes"]


def test_reads_without_native_library_and_llama_cpp(tiny_model, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('llama_cpp must not be needed')")
    code = f"import rotary_llamacpp as r; print(r.ModelInfo.read({str(tiny_model)!r}).n_expert)"
    ran = python(code, PYTHONPATH=f"{tmp_path}:{ROOT}", ROTARY_LIBRARY="/nonexistent.so")
    assert ran.stdout.strip() == "32"


def test_never_reads_the_weights(tiny_model, tmp_path):
    # The tiny model's header, with a hole in place of the weights, serves as well as the model.
    start = min(tensor.offset for tensor in _tensors(tiny_model))
    sparse = tmp_path / "sparse.gguf"
    with sparse.open("wb") as file:
        file.write(tiny_model.read_bytes()[:start])
        file.truncate(tiny_model.stat().st_size)

    def n_read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    expected, before = ModelInfo.read(tiny_model).layers, n_read()
    assert ModelInfo.read(sparse).layers == expected
    assert n_read() - before < start + (256 << 10) < sparse.stat().st_size // 2


def _tensors(path):
    from rotary_llamacpp.gguf_files.header import read_header

    return read_header(path).tensors
