# SPDX-License-Identifier: MIT
"""The committed tiny MoE model: a real language model, small enough to keep in the repository."""

import re

import llama_cpp
import pytest

from models import routing
from tests.support import ROOT

pytestmark = pytest.mark.model

MODEL = ROOT / "models" / "tiny-moe-q8_0.gguf"
PROMPT = "And the LORD said unto Moses,"
# Common English words, few of which occur in text that is not English.
COMMON = re.findall(
    r"\w+",
    "the of and to a in that he his it was for with as be not is had her they unto i him shall all said by "
    "from have my but she which their them ye on at so no were thou will are this upon there when",
)


@pytest.fixture(scope="module")
def model():
    return llama_cpp.Llama(str(MODEL), n_ctx=512, n_threads=1, seed=1, verbose=False)


def complete(model, prompt, n, **sampling):
    model.reset()
    return model(prompt, max_tokens=n, **sampling)["choices"][0]["text"]


def test_size_and_metadata(model):
    assert MODEL.stat().st_size <= 24e6
    meta = model.metadata
    assert meta["general.architecture"] == "qwen3moe"
    assert (meta["qwen3moe.expert_count"], meta["qwen3moe.expert_used_count"]) == ("32", "4")
    assert model.token_bos() == model.token_eos() == 0
    assert model.tokenize(b"In the beginning")[0] == 0, "add_bos"


def test_text_round_trips(model):
    text = "Emma's \u201ccarriage\u201d \u2014 1816:\n\nno more."
    ids = model.tokenize(text.encode(), add_bos=False)
    assert model.detokenize(ids).decode() == text
    assert len(model.tokenize(b" and the LORD said", add_bos=False)) == 4, "merges are in use"


def test_greedy_is_deterministic_english(model):
    first = complete(model, PROMPT, 32, temperature=0.0)
    assert complete(model, PROMPT, 32, temperature=0.0) == first
    words = re.findall(r"[a-z]+", first.lower())
    assert len(words) >= 15
    assert sum(w in COMMON for w in words) / len(words) > 0.35, first


@pytest.mark.parametrize("prompt", ["Emma was", "In those days", "It is a truth"])
def test_samples_read_as_english(model, prompt):
    no_end = {model.token_eos(): -1e9}
    text = complete(model, prompt, 60, temperature=0.7, seed=3, logit_bias=no_end)
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 20, text
    assert sum(w in COMMON for w in words) / len(words) > 0.3, words


def test_held_out_style_is_likelier_than_shuffled_words():
    """The model has learnt word order, not only words."""
    import numpy as np

    scorer = llama_cpp.Llama(str(MODEL), n_ctx=512, n_threads=1, logits_all=True, verbose=False)

    def nats(text):
        ids = scorer.tokenize(text.encode())
        scorer.reset()
        scorer.eval(ids)
        logits = np.array(scorer.scores[: len(ids) - 1], dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        return -(chosen - np.log(np.exp(logits).sum(axis=1))).sum()

    assert (
        nats("And the king said unto him, What is thy name?")
        < nats("unto name the said, him And What king thy is?") - 10
    )
    scorer.close()


def test_routing_is_learnt():
    trace = routing.record(MODEL, 100, prompt="It was a very", seed=1, temperature=0.8, n_threads=1)
    assert trace.shape == (100, 6, 4) and trace.min() >= 0 and trace.max() < 32
    assert routing.overlap(trace) > 1.4 * 4 / 32, "consecutive tokens share more experts than by chance"
    assert 0.6 < routing.usage_entropy(trace, 32) < 0.97, "neither collapsed nor uniform"
