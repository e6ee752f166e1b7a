# SPDX-License-Identifier: MIT
"""A Hugging Face folder through the pinned llama.cpp's own converter, compared with transformers' logits.

Skipped unless the converter's imports are installed; torch alone is hundreds of megabytes. To install them:
``pip install torch transformers sentencepiece safetensors``.
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from rotary_llamacpp import pinned
from rotary_llamacpp.conversion import folders
from rotary_llamacpp.conversion.convert import Options, convert
from rotary_llamacpp.errors import RotaryError
from rotary_llamacpp.gguf_files.header import read_header
from tests.support import ROOT
from tests.support.conversions import assert_nothing_else
from tests.support.tracing import prompt_tokens

pytestmark = [pytest.mark.model, pytest.mark.slow]

N_VOCAB = 512


@pytest.fixture
def mixtral(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A folder with a small random Mixtral in shards, and its logits of 20 tokens."""
    if missing := [name for name in folders._MODULES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed, which llama.cpp's converter imports")
    try:
        folders.converter()
    except RotaryError as error:
        sdist = ROOT / "build" / "sdist" / f"llama_cpp_python-{pinned.LLAMA_CPP_PYTHON}"
        assert not sdist.is_dir(), "an unpacked source is found"
        pytest.skip(str(error))
    import sentencepiece
    import torch
    import transformers

    folder = tmp_path / "mixtral"
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(400)]
    text = tmp_path / "text"
    text.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(2000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=N_VOCAB, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=N_VOCAB, hidden_size=256, intermediate_size=256, num_hidden_layers=2, head_dim=64,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="1MB")
    with torch.no_grad():
        logits = model.float().eval()(torch.tensor([prompt_tokens(N_VOCAB, 20)])).logits[0].numpy()
    return folder, logits


def test_a_folder_computes_what_transformers_computes(mixtral, tmp_path, stock_trace):
    folder, expected = mixtral
    results = tmp_path / "results"
    results.mkdir()
    (out,) = convert(folder, results / "out.gguf", Options(verify=True))
    assert_nothing_else(results, out)
    experts = [tensor for tensor in read_header(out).tensors if "_exps" in tensor.name]
    assert len(experts) == 6 and {(t.type_name, t.shape[2]) for t in experts} == {("BF16", 8)}
    found = stock_trace(out, n_prompt=20, n_decode=1)["logits"][:20]
    # llama.cpp rounds the input of a BF16 matrix to BF16; transformers computes in F32 here.
    assert ((found - expected) ** 2).mean() < 0.01 * (expected**2).mean()
