# SPDX-License-Identifier: MIT
"""Loads a model and generates text with timings, for ``rotary run``; samples as llama.cpp's own tools do.

Prints nothing: text goes to a callback, and a `Watcher` is told about progress.
"""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..config import RotaryConfig
from ..errors import ModelError, RotaryError
from ..gguf_files.info import ModelInfo
from ..host import machine
from ..host.interrupts import noted
from ..native.stock import llama_api
from ..units import decimal, mib, percent, span
from .llama import Llama
from .paging import default_model_params

# The default of llama.cpp's own tools, capped by the context that the model was trained for.
_DEFAULT_CTX = 4096


class Watcher:
    """Gets progress from the thread that runs `load` or `generate`; this base class ignores it."""

    def loading(self, fraction: float) -> None:
        """A fraction of the weights is loaded."""

    def prompt(self, llama: Llama, n_tokens: int) -> None:
        """The prompt is about to be computed."""

    def token(self, n_made: int, n_predict: int) -> None:
        """One more token has been chosen, and its text follows; at the first one the prompt is done."""

    def text(self, text: str) -> bool:
        """More text was made. Return True to keep it from `on_text` of `generate` and print it later."""
        return False


@dataclass(frozen=True)
class Generation:
    """Text and figures of one run. A rate over nothing is None."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_per_second: float | None
    tokens_per_second: float | None
    interrupted: bool
    rotary: dict[str, Any]  # Llama.rotary_stats()

    def to_dict(self) -> dict[str, Any]:
        """Convert to one flat dict of the text, the rates and the figures of paging."""
        plain = asdict(self)
        return {**plain.pop("rotary"), **plain}

    def summary(self) -> str:
        """Figures of the run in one line."""
        parts = [
            f"{self.completion_tokens} tokens at {decimal(self.tokens_per_second)} tok/s",
            f"prompt {self.prompt_tokens} at {decimal(self.prompt_tokens_per_second)} tok/s",
        ]
        stats = self.rotary
        if stats["active"]:
            slots = [layer["n_slots"] for layer in stats["layers"]] or [stats["n_slots"]]
            parts += [
                "no request" if stats["hit_rate"] is None else f"hit rate {percent(stats['hit_rate'])}",
                f"{mib(stats['bytes_paged'])} paged",
                f"{span(slots)} of {stats['n_expert']} slots per layer in {mib(stats['budget_bytes'])} on "
                f"{stats['inner_device']}",
            ]
            if stats["store"] == "direct":
                speed, accuracy = stats["read_bandwidth"], stats["prefetch_accuracy"]
                parts += [
                    "store direct",
                    "nothing read" if speed is None else f"{mib(speed)}/s from disk",
                    "no prefetch" if accuracy is None else f"prefetch accuracy {percent(accuracy)}",
                ]
        else:
            parts.append(f"not paged: {stats['reason']}")
        return "; ".join(parts)


def load(
    model: str,
    config: RotaryConfig | None,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_threads_batch: int | None = None,
    seed: int | None = None,
    verbose: bool = False,
    watcher: Watcher | None = None,
    **kwargs: Any,
) -> Llama:
    """Load a model for `generate`, without llama.cpp's line of dots for progress.

    By default, half of the CPUs that this process may use get a thread, and all of them for the prompt.

    Raises
    ------
    RotaryError
        The model cannot be loaded; also where stock raises a bare ValueError.
    """
    info = ModelInfo.read(model)
    interrupted = threading.Event()
    n_cpus = machine.cpu_count()
    if seed is not None:
        kwargs["seed"] = seed

    @llama_api.llama_progress_callback
    def on_progress(fraction: float, _: Any) -> bool:
        if watcher is not None:
            watcher.loading(fraction)
        return not interrupted.is_set()

    def adjust(params: Any) -> None:
        params.progress_callback = on_progress

    try:
        # A KeyboardInterrupt in the callback would be printed and lost. So the callback stops llama.cpp, and
        # the interrupt is raised here.
        with default_model_params(adjust), noted(interrupted, and_raised=False):
            llama = Llama(
                model,
                rotary=config,
                verbose=verbose,
                n_ctx=n_ctx or min(_DEFAULT_CTX, info.n_ctx_train or _DEFAULT_CTX),
                n_threads=n_threads or max(1, n_cpus // 2),
                n_threads_batch=n_threads_batch or n_threads or n_cpus,
                **kwargs,
            )
    except RotaryError:
        raise
    except UnicodeEncodeError as error:  # from stock, which encodes names as text
        raise ModelError(
            f"{model}: llama-cpp-python cannot open it, {error.reason}; rename it in UTF-8"
        ) from None
    except ValueError as error:
        if interrupted.is_set():
            raise KeyboardInterrupt from None
        raise ModelError(f"{model}: llama.cpp refuses it, {error}; run with --verbose to see why") from None
    if interrupted.is_set():
        llama.close()
        raise KeyboardInterrupt
    return llama


def generate(
    llama: Llama,
    prompt: str,
    n_predict: int,
    *,
    temp: float = 0.8,
    on_text: Callable[[str], None] = lambda text: None,
    watcher: Watcher | None = None,
) -> Generation:
    """Generate up to `n_predict` tokens after `prompt`, and pass on text as it is made.

    Ctrl-C ends the generation early; the text so far is returned. The time to the first token counts as the
    prompt's. One token is decoded before, as in llama.cpp's own tools, so that no figure counts the start of
    threads.

    Raises
    ------
    RotaryError
        The prompt does not fit into the context.
    """
    tokens = llama.tokenize(prompt.encode(), add_bos=bool(llama._model.add_bos_token()), special=True)
    if not tokens:
        tokens = [llama.token_bos()]
    n_ctx = len(llama.input_ids)  # llama.cpp rounds its own n_ctx() up, but stock's buffers are no larger
    if len(tokens) >= n_ctx:
        raise RotaryError(
            f"prompt: {len(tokens)} tokens; the context holds {n_ctx}; shorten it or raise --ctx"
        )
    room = min(n_predict, n_ctx - len(tokens))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may span tokens
    pieces: list[str] = []
    made: list[int] = []
    interrupted = threading.Event()
    watcher = watcher or Watcher()

    def put(data: bytes, final: bool = False) -> None:
        if text := decoder.decode(data, final):
            pieces.append(text)
            if not watcher.text(text):
                on_text(text)

    start = first = end = time.monotonic()
    try:
        with noted(interrupted, and_raised=True):
            llama.eval(tokens[:1])
            llama.reset()
            llama.rotary_reset_stats()
            watcher.prompt(llama, len(tokens))
            start = first = end = time.monotonic()
            for token in llama.generate(tokens, temp=temp) if room > 0 else ():
                end = time.monotonic()
                if not made:
                    first = end
                if llama_is_eog(llama, token):
                    break
                piece = llama.detokenize([token], prev_tokens=tokens + made)
                made.append(token)
                watcher.token(len(made), room)
                put(piece)
                if len(made) == room or interrupted.is_set():
                    break
    except KeyboardInterrupt:
        interrupted.set()
    put(b"", final=True)
    return Generation(
        text="".join(pieces),
        prompt_tokens=len(tokens),
        completion_tokens=len(made),
        prompt_tokens_per_second=_per_second(len(tokens), first - start),
        tokens_per_second=_per_second(len(made) - 1, end - first),
        interrupted=interrupted.is_set(),
        rotary=llama.rotary_stats(),
    )


def llama_is_eog(llama: Llama, token: int) -> bool:
    """Whether the token ends the generation; a model may have several such tokens."""
    return bool(llama_api.llama_vocab_is_eog(llama._model.vocab, token))


def _per_second(n_tokens: int, seconds: float) -> float | None:
    return n_tokens / seconds if n_tokens > 0 and seconds > 0 else None
