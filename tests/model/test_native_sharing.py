# SPDX-License-Identifier: MIT
"""Several users of one pool do not disturb each other: contexts of one model, threads, two models in turn."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from rotary_llamacpp import Llama
from tests.support import HANG_S
from tests.support.paged import logits, second_context

pytestmark = pytest.mark.model

OPTIONS = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
TOKENS = list(range(20, 60))


def test_two_contexts_of_one_model_share_slots(native, tiny_model):
    with_all = Llama(str(tiny_model), rotary="100%", **OPTIONS)
    expected = [logits(with_all, TOKENS), logits(with_all, TOKENS[::-1])]
    with_all.close()

    llama = Llama(str(tiny_model), rotary="min", **OPTIONS)
    context, run = second_context(llama)
    for _ in range(2):
        assert np.array_equal(logits(llama, TOKENS), expected[0])
        assert np.array_equal(run(TOKENS[::-1]), expected[1])
    context.close()
    # The slots must outlive the context that used them last.
    assert np.array_equal(logits(llama, TOKENS), expected[0])
    llama.close()


def test_two_contexts_in_two_threads(native, tiny_model):
    llama = Llama(str(tiny_model), rotary="min", **OPTIONS)
    context, run = second_context(llama)
    expected = [logits(llama, TOKENS), run(TOKENS[::-1])]
    found = [[], []]

    def repeat(i, function, tokens):
        found[i] = [function(tokens) for _ in range(5)]

    threads = [
        threading.Thread(target=repeat, args=(0, lambda tokens: logits(llama, tokens), TOKENS)),
        threading.Thread(target=repeat, args=(1, run, TOKENS[::-1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    context.close()
    llama.close()
    for i in range(2):
        assert len(found[i]) == 5
        assert all(np.array_equal(each, expected[i]) for each in found[i])


def test_a_model_closed_leaves_the_other_alone(native, tiny_model, synthetic):
    first = Llama(str(tiny_model), rotary="25%", **OPTIONS)
    expected = logits(first, TOKENS)
    second = Llama(str(synthetic()), rotary="min", **OPTIONS)
    logits(second, TOKENS)
    assert second.rotary_stats()["misses"] > 0
    second.close()
    assert np.array_equal(logits(first, TOKENS), expected)
    assert first.rotary_stats()["n_slots"] == 8
    first.close()


def test_figures_can_be_read_while_a_graph_runs(native, tiny_model):
    llama = Llama(str(tiny_model), rotary="min", **OPTIONS)
    done = threading.Event()
    seen = []

    def watch():
        while not seen or not done.is_set():
            seen.append(llama.rotary_stats()["requests"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(5):
        logits(llama, TOKENS)
    done.set()
    watcher.join(HANG_S)
    assert seen == sorted(seen) != []
    assert llama.rotary_stats()["requests"] == 5 * len(TOKENS) * 6 * 4  # 6 layers, 4 experts a token
    llama.close()


def test_calls_are_muted_in_their_thread_alone(native, capfd):
    import logging

    from llama_cpp import _logger

    from rotary_llamacpp.native import binding as _native

    logger = logging.getLogger("llama-cpp-python")
    before = logger.level
    steps = [threading.Event() for _ in range(2)]

    def say(text):
        _logger.llama_log_callback(3, text.encode(), None)  # as an error

    def overlapping():
        with _native.native_log_muted():
            steps[0].set()
            assert steps[1].wait(60)
            say("muted there;")

    try:
        thread = threading.Thread(target=overlapping)
        with _native.native_log_muted():
            say("muted here;")
            thread.start()
            assert steps[0].wait(60)
        say("heard;")  # while the other is muted
        _logger.set_verbose(True)
        assert logger.level == logging.DEBUG
        steps[1].set()
        thread.join()
        assert logger.level == logging.DEBUG, "what somebody set meanwhile stands"
        assert capfd.readouterr().err == "heard;"
    finally:
        logger.setLevel(before)


def test_figures_while_a_pool_forms_its_layers_anew(native, tiny_model, monkeypatch):
    """The number of layers is read before the layers, and may change in between."""
    llama = Llama(str(tiny_model), rotary="25%", n_ctx=64, verbose=False)
    pool = llama._rotary.pools._pools[0]
    figures = pool.stats()
    monkeypatch.setattr(pool, "stats", lambda: {**figures, "n_layers": figures["n_layers"] + 1})
    assert len(llama.rotary_stats()["layers"]) == figures["n_layers"] == 6
    llama.close()
