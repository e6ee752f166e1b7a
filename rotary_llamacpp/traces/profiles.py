# SPDX-License-Identifier: MIT
"""Profiles: which experts a model's layers choose most often, learnt from traces and kept beside the model.

``model.gguf`` has its profile in ``model.gguf.profile``: a NumPy archive of ``popularity`` float32 [n_layers,
n_expert], the share of tokens that chose each expert; ``pairs`` float16 [n_layers - 1, n_expert, n_expert],
the share of an expert's uses after which the next layer chose each expert; ``meta``, JSON with the layer
numbers, tokens and where they come from. ``rotary convert`` stores the same archive in the model itself.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RotaryError
from ..gguf_files.fields import array_bytes, raw_fields
from ..gguf_files.header import read_header
from ..host.files import check_regular, writing
from .archive import DAMAGED, MAX_PAIRS, Trace

FORMAT = 1
KEY = "rotary.profile"  # key of a model's metadata: the archive as an array of bytes


@dataclass
class Profile:
    """Popularity of experts and transitions between layers; see the module."""

    layers: list[int]
    popularity: NDArray[np.float32]
    pairs: NDArray[np.float16]
    n_tokens: int
    about: dict[str, Any]

    @property
    def n_expert(self) -> int:
        """Number of experts of the largest layer."""
        return int(self.popularity.shape[1])

    def ranked(self, layer: int) -> list[int]:
        """Return the experts that a layer has chosen, most often chosen first."""
        share = self.popularity[self.layers.index(layer)]
        order = np.argsort(-share, kind="stable")
        return [int(expert) for expert in order if share[expert] > 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the archive, under a temporary name until it is complete."""
        meta = {"format": FORMAT, "layers": self.layers, "n_tokens": self.n_tokens, "about": self.about}
        with writing(path) as file:
            np.savez_compressed(
                file, popularity=self.popularity, pairs=self.pairs,
                meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
            )  # fmt: skip


def beside(model: str | os.PathLike[str]) -> Path:
    """Path of the profile of a model, whether or not it exists."""
    return Path(f"{os.fspath(model)}.profile")


def learn(traces: Sequence[Trace]) -> Profile:
    """Learn a profile from traces of one model; each token counts the same.

    Raises
    ------
    RotaryError
        The traces are of different models.
    """
    layers, n_expert = traces[0].layers, traces[0].n_expert
    if len(layers) * n_expert**2 > MAX_PAIRS:
        raise RotaryError(
            f"traces: {len(layers)} layers of {n_expert} experts have {len(layers) * n_expert**2} pairs of "
            f"experts; at most {MAX_PAIRS} are possible; check that a model made them"
        )
    uses = np.zeros((len(layers), n_expert))
    pairs = np.zeros((max(len(layers) - 1, 0), n_expert, n_expert))
    tokens = np.zeros(len(layers))
    for trace in traces:
        if (trace.layers, trace.n_expert) != (layers, n_expert):
            raise RotaryError(
                f"traces: {len(trace.layers)} layers of {trace.n_expert} experts, {len(layers)} of "
                f"{n_expert} before; a profile is for one model; leave the others out"
            )
        index = {layer: i for i, layer in enumerate(layers)}
        before: tuple[tuple[int, int, int], list[int]] | None = None
        for sequence, step, layer, row in zip(
            trace.sequence.tolist(), trace.step.tolist(), trace.layer.tolist(), trace.experts, strict=True
        ):
            at, experts = index[layer], row[row >= 0].tolist()
            uses[at, experts] += 1
            tokens[at] += 1
            if before is not None and before[0] == (sequence, step, at - 1):
                pairs[at - 1][np.ix_(before[1], experts)] += 1
            before = ((sequence, step, at), experts)
    shares = pairs / np.maximum(uses[:-1, :, None], 1)
    return Profile(
        layers, (uses / np.maximum(tokens, 1)[:, None]).astype(np.float32), shares.astype(np.float16),
        int(tokens.max()), {"traces": [trace.about for trace in traces]},
    )  # fmt: skip


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile.

    Raises
    ------
    RotaryError
        The file does not exist, is not a profile, or is damaged.
    """
    return _read(path, path)


def stored(model: str | os.PathLike[str]) -> Profile | None:
    """Read the profile in the metadata of a model; None if it has none.

    Raises
    ------
    ModelError
        The model cannot be read.
    RotaryError
        The metadata has something else under the key.
    """
    raw = raw_fields(read_header(model), [KEY]).get(KEY)
    if raw is None:
        return None
    return _read(io.BytesIO(array_bytes(raw, KEY) or b""), f"{os.fspath(model)}: {KEY}")


def _read(file: str | os.PathLike[str] | io.BytesIO, name: object) -> Profile:
    try:
        if not isinstance(file, io.BytesIO):
            check_regular(file)
        with np.load(file, allow_pickle=False) as archive:
            meta = json.loads(archive["meta"].tobytes())
            popularity, pairs = archive["popularity"], archive["pairs"]
        n_layers, n_expert = popularity.shape
        if meta["format"] != FORMAT or len(meta["layers"]) != n_layers:
            raise ValueError(f"format {meta['format']}, {n_layers} layers")
        if pairs.shape != (n_layers - 1, n_expert, n_expert):
            raise ValueError("arrays of different shapes")
        if not (_are_shares(popularity) and _are_shares(pairs)):
            raise ValueError("shares out of range")
        popularity = np.ascontiguousarray(popularity, np.float32)  # the library reads contiguous float32
        layers = [int(layer) for layer in meta["layers"]]
        if len({*layers}) < n_layers or not all(0 <= layer < 1 << 31 for layer in layers):
            raise ValueError(f"layers {layers}")
        if not 0 <= (n_tokens := int(meta["n_tokens"])) < 1 << 63:
            raise ValueError(f"{n_tokens} tokens")
        return Profile(layers, popularity, pairs, n_tokens, dict(meta["about"]))
    except OSError as error:
        raise RotaryError(f"{name}: cannot be read, {error.strerror or error}; check the name") from error
    except DAMAGED as error:
        raise RotaryError(
            f"{name}: not a profile, or damaged; make it again with `rotary profile`"
        ) from error


def _are_shares(array: NDArray[Any]) -> bool:
    """Check shares; some exceed 1, by rounding or because a router named an expert twice."""
    return array.dtype.kind == "f" and bool(((array >= 0) & (array <= 1024)).all())
