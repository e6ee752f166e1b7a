# SPDX-License-Identifier: MIT
"""Records a routing trace while a model answers prompts, for ``rotary trace``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ..config import RotaryConfig
from ..errors import RotaryError
from ..gguf_files.info import ModelInfo
from ..host.interrupts import noted
from ..native.pools import Pools
from ..traces.archive import DECODE, PREFILL, Recorder, Trace
from .generation import llama_is_eog, load
from .llama import Llama


def read_prompts(path: str) -> list[str]:
    """Read prompts, one per line; empty lines are skipped.

    Raises
    ------
    RotaryError
        The file does not exist, is not UTF-8, or has no prompt.
    """
    try:
        prompts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RotaryError(
            f"{path}: cannot be read, {error}; give a text file with one prompt per line"
        ) from error
    if not prompts:
        raise RotaryError(f"{path}: has no prompt; write at least one, one per line")
    return prompts


def record(
    model: str,
    prompts: list[str],
    n_predict: int,
    config: RotaryConfig | None,
    *,
    temp: float = 0.8,
    seed: int | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    on_prompt: Callable[[int, int], None] = lambda number, n_tokens: None,
) -> Trace:
    """Answer each prompt and record the routing of all tokens.

    Prompts are checked before the first is computed. A later failure, or Ctrl-C, ends the recording, and what
    was recorded is returned: ``about`` then has ``failed``, the reason in one line, or ``interrupted``.

    Parameters
    ----------
    n_predict : int
        Maximum number of tokens to generate for each prompt.
    on_prompt : function
        Called when a prompt begins, with its number, from 0, and its number of tokens.

    Raises
    ------
    RotaryError
        The model has no experts, paging is off, or a prompt does not fit into the context.
    Exception
        The failure itself, or KeyboardInterrupt, if nothing was recorded before it.
    """
    info = ModelInfo.read(model)
    if not info.is_moe:
        raise RotaryError(f"{info.path.name}: dense model, nothing is routed; choose a MoE model")
    if config is None:
        raise RotaryError(f"{info.path.name}: paging is off, so no routing is recorded; give a budget")
    llama = load(model, config, n_ctx=n_ctx, n_threads=n_threads, seed=seed)
    interrupted = threading.Event()
    failed: Exception | None = None
    number = 0
    try:
        pools = llama._rotary.pools
        assert pools is not None, "a MoE model with a config is paged"
        layers = {layer["il"]: layer for layer in pools.layer_stats()}
        recorder = Recorder(
            max(layer["n_expert"] for layer in layers.values()),
            {il: layer["expert_bytes"] for il, layer in layers.items()},
            {"model": info.path.name, "prompts": len(prompts), "temp": temp, "budget": str(config.budget)},
        )
        tokenized = [_tokens(llama, each, prompt, n_predict) for each, prompt in enumerate(prompts)]
        pools.trace(True)
        try:
            with noted(interrupted, and_raised=True):
                for number, tokens in enumerate(tokenized):
                    on_prompt(number, len(tokens))
                    _answer(llama, pools, recorder, number, tokens, n_predict, temp, interrupted)
                    if interrupted.is_set():
                        break
        except KeyboardInterrupt:
            interrupted.set()
        except Exception as error:  # of any kind: the prompts before it are worth keeping
            failed = error
    finally:
        llama.close()
    if recorder.n_sequences == 0 and failed is not None:
        raise failed
    if recorder.n_sequences == 0 and interrupted.is_set():
        raise KeyboardInterrupt
    recorder.about["prompts"] = recorder.n_sequences
    if interrupted.is_set():
        recorder.about["interrupted"] = True
    elif failed is not None:
        reason = " ".join(str(failed).split()) or type(failed).__name__
        recorder.about["failed"] = f"prompt {number + 1}: {reason}"
    return recorder.trace()


def _tokens(llama: Llama, number: int, prompt: str, n_predict: int) -> list[int]:
    tokens = llama.tokenize(prompt.encode(), add_bos=bool(llama._model.add_bos_token()), special=True)
    tokens = tokens or [llama.token_bos()]
    if len(tokens) + n_predict > len(llama.input_ids):
        raise RotaryError(
            f"prompt {number + 1}: {len(tokens)} tokens and {n_predict} more; the context holds "
            f"{len(llama.input_ids)}; shorten it, lower -n or raise --ctx"
        )
    return tokens


def _answer(
    llama: Llama, pools: Pools, recorder: Recorder, number: int, tokens: list[int], n_predict: int,
    temp: float, interrupted: threading.Event,
) -> None:  # fmt: skip
    llama.reset()
    llama.eval(tokens)
    step = recorder.add(_numbers(pools), number, PREFILL, 0)
    n_done = 0
    try:
        while n_done < n_predict and not interrupted.is_set():
            token = llama.sample(temp=temp)
            if llama_is_eog(llama, token):
                break
            llama.eval([token])
            n_done += 1
    finally:
        recorder.add(_numbers(pools), number, DECODE, step, n_done)


def _numbers(pools: Pools) -> list[int]:
    numbers, n_dropped = pools.read_trace()
    if n_dropped:
        raise RotaryError(
            f"trace: {n_dropped} lookups were dropped; at most 64 MiB are kept at once; shorten the prompt"
        )
    return numbers
