# SPDX-License-Identifier: MIT
"""The measured process of beyond_ram.py: load a model, prompt it, decode token by token. Prints nothing."""

from __future__ import annotations

import hashlib
import itertools
import time
from pathlib import Path

from benchmarks.cgroups import join
from benchmarks.common import last_logits

REPEAT = 8  # tokens of the cycle in the routing "repeat"


def measure(job: dict) -> dict:
    """Load a model and time the prompt, then single tokens of each stream.

    Parameters
    ----------
    job : dict
        ``model``; ``rotary``, the argument of `Llama`; ``repack``, for stock; ``groups`` to join;
        ``streams``, a choice of "calibrated", "random" (both random tokens) and "repeat"; ``n_prompt``,
        ``n_warm``, ``n_decode``, ``n_threads``; ``give_up_s``, the seconds for a stream, by stream.

    Returns
    -------
    dict
        ``load_s``, ``anonymous_bytes`` that loading took, ``prefill`` in tokens per second, ``prefill_stats``
        and, by stream, ``decode`` in tokens per second, ``n_timed``, the ``hash`` of the last logits,
        ``stats``, and whether the stream was ``cut`` short.
    """

    from rotary_llamacpp import Llama

    join(job["groups"])
    if job["rotary"] is None and not job["repack"]:
        preset("llama_model_default_params", use_extra_bufts=False)

    before = anonymous_bytes()
    begin = time.perf_counter()
    llama = Llama(
        job["model"], rotary=job["rotary"], n_ctx=n_context(job), n_batch=512, n_threads=job["n_threads"],
        n_threads_batch=job["n_threads"], verbose=False,
    )  # fmt: skip
    load_s, loaded = time.perf_counter() - begin, anonymous_bytes() - before
    prompt, streams = tokens_of(job, llama.n_vocab())
    llama.eval(prompt[:8])  # first touch of buffers and threads
    llama.reset()
    llama.rotary_reset_stats()
    begin = time.perf_counter()
    llama.eval(prompt)
    result = {
        "load_s": load_s, "anonymous_bytes": loaded,
        "prefill": len(prompt) / (time.perf_counter() - begin),
        "prefill_stats": without_layers(llama.rotary_stats()),
        "streams": {},
    }  # fmt: skip
    for name, tokens in streams.items():
        give_up_s = job["give_up_s"].get(name, float("inf"))
        begin = time.perf_counter()
        for index, token in enumerate(tokens):
            if index == job["n_warm"]:
                llama.rotary_reset_stats()
                begin = time.perf_counter()
            llama.eval([token])
            seconds = time.perf_counter() - begin
            if seconds > give_up_s:
                break
        n_timed = index + 1 - (job["n_warm"] if index >= job["n_warm"] else 0)
        logits = last_logits(llama)
        cut = index + 1 < len(tokens)
        result["streams"][name] = {
            "decode": n_timed / seconds, "n_timed": n_timed, "cut": cut,
            "hash": None if cut else hashlib.sha256(logits.tobytes()).hexdigest()[:16],
            "stats": without_layers(llama.rotary_stats()),
        }  # fmt: skip
        if cut:
            break
    llama.close()
    return result


def preset(name: str, **fields: object) -> None:
    """Replace llama_cpp's `name`, which returns default params, by a function that also sets `fields`."""
    import llama_cpp.llama_cpp as llama_api

    stock_params = getattr(llama_api, name)

    def params() -> object:
        made = stock_params()
        for field, value in fields.items():
            setattr(made, field, value)
        return made

    setattr(llama_api, name, params)


def anonymous_bytes() -> int:
    """Resident memory of this process that is not backed by a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not say what is anonymous")


def n_context(job: dict) -> int:
    """Context size, equal for all jobs of a run since the choice of kernels may depend on it."""
    return job["n_prompt"] + 2 * (job["n_warm"] + job["n_decode"]) + 8


def tokens_of(job: dict, n_vocab: int) -> tuple[list[int], dict[str, list[int]]]:
    """The prompt, and the tokens of each stream, warm-up included."""
    import numpy as np

    rng = np.random.default_rng(0)
    prompt = [int(t) for t in rng.integers(10, n_vocab - 1, job["n_prompt"])]
    n_tokens = job["n_warm"] + job["n_decode"]
    tokens = [int(t) for t in rng.integers(10, n_vocab - 1, n_tokens)]
    cycle = list(itertools.islice(itertools.cycle(tokens[:REPEAT]), n_tokens))
    return prompt, {name: cycle if name == "repeat" else tokens for name in job["streams"]}


def without_layers(stats: dict) -> dict:
    """The totals of `rotary_stats`, without the figures of each layer."""
    return {name: value for name, value in stats.items() if name != "layers"}


def overlaps(job: dict) -> dict[str, float | None]:
    """Lag-1 overlap of the routing of each stream's timed tokens, as stock llama.cpp routes them."""
    import llama_cpp
    import numpy as np

    from models.routing import observer, overlap

    seen: dict[int, list[int]] = {}
    preset("llama_context_default_params", cb_eval=observer(llama_cpp, seen))
    llama = llama_cpp.Llama(
        job["model"], n_ctx=n_context(job), n_batch=512, n_threads=job["n_threads"],
        n_threads_batch=job["n_threads"], verbose=False,
    )  # fmt: skip
    prompt, streams = tokens_of(job, llama.n_vocab())
    llama.eval(prompt)
    found = {}
    for name, tokens in streams.items():
        trace = []
        for token in tokens:
            llama.eval([token])
            trace.append([seen[il] for il in sorted(seen)])
        found[name] = overlap(np.array(trace[job["n_warm"] :], dtype=np.int32))
    llama.close()
    return found
