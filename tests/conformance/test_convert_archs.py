# SPDX-License-Identifier: MIT
"""Models of every architecture, split and merged again, and the logits of those with experts.

The models come from test-llama-archs (`make conformance`); stock llama_cpp computes in a separate process.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.gguf_files.header import read_header
from rotary_llamacpp.gguf_files.info import ModelInfo, read_shards
from tests.conformance.test_conformance import run
from tests.support.conversions import fields_of, tensor_bytes
from tests.support.processes import apart

pytestmark = [pytest.mark.conformance, pytest.mark.slow]

N_SAVED = 128  # models that the pinned llama.cpp saves
N_SAVED_MOE = 55
# MoE architectures by upstream's count, whose models have no expert tensors.
WITHOUT_EXPERTS = ["ernie4_5-moe.gguf", "paddleocr-moe.gguf"]
N_TOKENS = 32


def logits_of(paths: list[Path]) -> list[np.ndarray]:
    """Logits of several models for the same tokens, each (N_TOKENS, n_vocab)."""
    import llama_cpp.llama_cpp as api

    @api.llama_log_callback
    def silent(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
        pass

    api.llama_log_set(silent, ctypes.c_void_p(0))
    found = []
    for path in paths:
        params = api.llama_model_default_params()
        params.use_extra_bufts = False  # repacking depends on where weights lie
        model = api.llama_model_load_from_file(str(path).encode(), params)
        assert model, f"{path} is not loaded"
        options = api.llama_context_default_params()
        options.n_ctx, options.n_threads, options.n_threads_batch = N_TOKENS, 1, 1
        context = api.llama_init_from_model(model, options)
        n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        tokens = np.random.default_rng(1).integers(0, n_vocab, N_TOKENS).astype(np.int32)
        batch = api.llama_batch_init(N_TOKENS, 0, 1)
        batch.n_tokens = N_TOKENS
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert api.llama_decode(context, batch) == 0, f"{path} is not computed"
        rows = [
            np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (n_vocab,)) for i in range(N_TOKENS)
        ]
        found.append(np.array(rows))
        api.llama_batch_free(batch)
        api.llama_free(context)
        api.llama_model_free(model)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The models that test-llama-archs saves, of 1 to 30 MiB."""
    folder = tmp_path_factory.mktemp("archs")
    run("test-llama-archs", "-s", "1", "-o", str(folder), backend=False)
    return sorted(folder.iterdir())


def assert_same_logits(models: list[list[Path]]) -> None:
    """Check that all files of a model give the same logits, then remove the folders of the copies.

    One process computes all models, as its start takes longer than a model.
    """
    logits = iter(apart(logits_of, [path for paths in models for path in paths]))
    for path, *others in models:
        one = next(logits)
        assert np.isfinite(one).all() and one.std() > 0, path.name
        for other in others:
            assert (next(logits) == one).all(), f"{path.name}: {other.name}"
            shutil.rmtree(other.parent, ignore_errors=True)
    models.clear()


def test_every_architecture_there_and_back(saved, tmp_path):
    assert len(saved) == N_SAVED
    without = []
    with_experts: list[list[Path]] = []
    n_moe = 0
    for path in saved:
        folder = tmp_path / path.stem
        folder.mkdir()
        split = convert(path, folder / "split.gguf", Options(split_bytes=path.stat().st_size // 3))
        (merged,) = convert(split[0], folder / "merged.gguf", Options(alignment=32))
        before = tensor_bytes([read_header(path)])
        assert tensor_bytes(read_shards(split[0])) == before == tensor_bytes([read_header(merged)]), path.name
        assert fields_of(split[0]) == fields_of(merged) == fields_of(path), path.name
        info = ModelInfo.read(split[0])
        assert info.layers == ModelInfo.read(path).layers and len(info.files) == len(split)
        if path.name.endswith("-moe.gguf"):
            n_moe += 1
            if not info.is_moe:
                without.append(path.name)
            with_experts.append([path, split[0], merged])
        else:
            shutil.rmtree(folder)
        if len(with_experts) == 8 or path == saved[-1]:
            assert_same_logits(with_experts)
    assert without == WITHOUT_EXPERTS
    assert n_moe == N_SAVED_MOE
