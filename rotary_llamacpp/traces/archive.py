# SPDX-License-Identifier: MIT
"""Routing traces: which experts each layer chose for each token, to be replayed without the model.

A trace is written as a NumPy archive, compressed, of the arrays that `Trace` documents (``resident`` in
packed bits; ``meta`` is JSON with the rest), or read and written as CSV, ``route_trace v1``: one row for each
expert of a token in a layer, with the columns turn, phase, step, layer, slot, expert, weight, residency,
expert_bytes, behind comment lines with the layers' sizes.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RotaryError
from ..gguf_files.info import MAX_EXPERTS
from ..host.files import check_regular, writing

PREFILL, DECODE = 0, 1
FORMAT = 1
_CSV_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
_MAX_ROWS = 1 << 28  # of one archive, whatever its header says
MAX_PAIRS = 1 << 27  # pairs of experts in all layers, because predictors have tables of them


@dataclass
class Trace:
    """Routings token by token: one row for each (sequence, step, layer), in that order.

    Attributes
    ----------
    sequence, phase, step, layer : int array [n]
        Number of the prompt, from 0; `PREFILL` or `DECODE`; number of the token in the sequence, from 0; the
        model's layer.
    experts : int array [n, n_used]
        Experts that the layer chose, the router's first choice first; -1 where it chose fewer.
    weights : float32 array [n, n_used]
        The router's weights; NaN where not recorded.
    resident : bool array [n, n_used]
        Whether the expert was resident when it was asked for.
    n_expert : int
        Number of experts of the largest layer.
    expert_bytes : dict
        Bytes of one expert by layer.
    about : dict
        Where the trace comes from: model, prompts and the like.
    """

    sequence: NDArray[Any]
    phase: NDArray[Any]
    step: NDArray[Any]
    layer: NDArray[Any]
    experts: NDArray[Any]
    weights: NDArray[Any]
    resident: NDArray[Any]
    n_expert: int
    expert_bytes: dict[int, int]
    about: dict[str, Any]

    @property
    def layers(self) -> list[int]:
        """Layer numbers, ascending."""
        return sorted(self.expert_bytes)

    def tokens(self, phase: int | None = None) -> int:
        """Number of tokens, of one phase or of both."""
        rows = np.ones(len(self.step), bool) if phase is None else self.phase == phase
        return len(np.unique(np.stack([self.sequence[rows], self.step[rows]]), axis=1).T)

    def describe(self) -> str:
        """Size of the trace in one line of text."""
        return (
            f"{self.tokens()} tokens in {len(self.layers)} layers, "
            f"{self.experts.shape[1]} of {self.n_expert} experts each"
        )

    def select(self, rows: NDArray[Any]) -> Trace:
        """Keep only these rows."""
        arrays = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return Trace(**arrays, n_expert=self.n_expert, expert_bytes=self.expert_bytes, about=self.about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an archive, or CSV if the name ends in .csv, under a temporary name until it is complete."""
        with writing(path) as file:
            if Path(path).suffix == ".csv":
                file.write(self._csv().encode())
            else:
                np.savez_compressed(file, **self._archive())

    def _archive(self) -> dict[str, Any]:
        meta = {
            "format": FORMAT, "n_expert": self.n_expert, "about": self.about,
            "expert_bytes": {str(layer): n for layer, n in self.expert_bytes.items()},
        }  # fmt: skip
        small = {
            "experts": np.int16,
            "layer": np.int16,
            "phase": np.int8,
            "sequence": np.int32,
            "step": np.int32,
        }
        arrays = {name: getattr(self, name).astype(small.get(name)) for name in _ARRAYS if name in small}
        return {
            **arrays,
            "weights": self.weights.astype(np.float32),
            "resident": np.packbits(self.resident, axis=None),
            "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        }

    def _csv(self) -> str:
        lines = ["# route_trace v1"]
        lines.append(f"# model={self.about.get('model', '')} n_expert={self.n_expert}")
        lines += [f"# layer={layer} expert_bytes={n}" for layer, n in sorted(self.expert_bytes.items())]
        lines.append(_CSV_COLUMNS)
        for i in range(len(self.step)):
            head = f"{self.sequence[i]},{self.phase[i]},{self.step[i]},{self.layer[i]}"
            for k, expert in enumerate(self.experts[i]):
                if expert >= 0:
                    moved = 0 if self.resident[i, k] else self.expert_bytes[int(self.layer[i])]
                    weight = f"{self.weights[i, k]:.6g}"
                    lines.append(f"{head},{k},{expert},{weight},{int(self.resident[i, k])},{moved}")
        return "\n".join(lines) + "\n"


DAMAGED = (
    ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, EOFError, RuntimeError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip
_ARRAYS = ("sequence", "phase", "step", "layer", "experts", "weights", "resident")


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a trace, an archive or CSV.

    Raises
    ------
    RotaryError
        The file does not exist, is neither an archive nor CSV, or is damaged.
    """
    path = Path(path)
    try:
        check_regular(path)
        with open(path, "rb") as file:
            archive = file.read(2) == b"PK"
        return _read_archive(path) if archive else _read_csv(path)
    except OSError as error:
        raise RotaryError(f"{path}: cannot be read, {error.strerror}; check the name") from error
    except DAMAGED as error:
        raise RotaryError(
            f"{path}: not a routing trace, or damaged; record one with "
            "`rotary trace`, or give route_trace CSV"
        ) from error


def _read_archive(path: Path) -> Trace:
    with np.load(path, allow_pickle=False) as archive:
        meta = json.loads(archive["meta"].tobytes())
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}, {FORMAT} is read here")
        arrays = {name: archive[name] for name in _ARRAYS}
    shape = arrays["experts"].shape
    if len(shape) != 2 or any(len(arrays[name]) != shape[0] for name in _ARRAYS[:4]):
        raise ValueError("arrays of different lengths")
    n = shape[0] * shape[1]
    if arrays["weights"].shape != shape or len(arrays["resident"]) != (n + 7) // 8:
        raise ValueError("arrays of different shapes")
    arrays["resident"] = np.unpackbits(arrays["resident"])[:n].reshape(shape).astype(bool)
    if arrays["weights"].dtype.kind != "f" or not isinstance(meta["about"], dict):
        raise ValueError(f"weights of {arrays['weights'].dtype}")
    whole = {name: _whole(array) for name, array in arrays.items() if name not in ("weights", "resident")}
    return _checked(
        Trace(
            **whole,
            weights=arrays["weights"].astype(np.float32),
            resident=arrays["resident"],
            n_expert=int(meta["n_expert"]),
            expert_bytes={int(layer): int(size) for layer, size in meta["expert_bytes"].items()},
            about=meta["about"],
        )
    )


def _whole(array: NDArray[Any]) -> NDArray[np.int32]:
    """Convert to integers, which are floats when read from CSV."""
    if array.dtype.kind not in "iuf" or not (np.abs(array.astype(np.float64)) < 1 << 31).all():
        raise ValueError(f"{array.dtype}, or numbers of over 32 bits")
    whole = array.astype(np.int32)
    if not (whole == array).all():
        raise ValueError("numbers that are not whole")
    return whole


def _read_csv(path: Path) -> Trace:
    about: dict[str, Any] = {}
    expert_bytes: dict[int, int] = {}
    rows: list[list[str]] = []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for fields in csv.reader(file):
            if not fields:
                continue
            if fields[0].startswith("#"):
                named = dict(item.split("=", 1) for item in fields[0][1:].split() if "=" in item)
                if "layer" in named:
                    expert_bytes[int(named["layer"])] = int(named["expert_bytes"])
                else:
                    about.update(named)
            elif fields[0] != "turn":
                rows.append(fields)
    table = np.array(rows, np.float64).reshape(len(rows), 9)
    if len(table) == 0:
        raise ValueError("no rows")
    keys = _whole(table[:, :4])
    if not (np.abs(table[:, 8]) < 1 << 63).all():
        raise ValueError("a size out of range")
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    row, slot = np.cumsum(new) - 1, _whole(table[:, 4])
    n_used = int(slot.max()) + 1
    if slot.min() < 0 or n_used > 1024:
        raise ValueError(f"slot {slot.min()} to {slot.max()}")
    experts = np.full((row[-1] + 1, n_used), -1, np.int32)
    weights = np.full(experts.shape, np.nan, np.float32)
    resident = np.zeros(experts.shape, bool)
    experts[row, slot] = _whole(table[:, 5])
    with np.errstate(over="ignore"):
        weights[row, slot] = table[:, 6]
    resident[row, slot] = table[:, 7] > 0
    for layer in np.unique(keys[:, 3]).tolist():
        expert_bytes.setdefault(layer, int(table[keys[:, 3] == layer, 8].max()))
    known = int(about.get("n_expert", 0))
    return _checked(
        Trace(
            sequence=keys[new, 0], phase=keys[new, 1], step=keys[new, 2], layer=keys[new, 3],
            experts=experts, weights=weights, resident=resident,
            n_expert=max(known, int(experts.max()) + 1), expert_bytes=expert_bytes, about=about,
        )
    )  # fmt: skip


def _checked(trace: Trace) -> Trace:
    experts = trace.experts
    if len(experts) == 0 or len(experts) > _MAX_ROWS:
        raise ValueError(f"{len(experts)} rows")
    if experts.min() < -1 or experts.max() >= trace.n_expert or (experts[:, 0] < 0).any():
        raise ValueError(f"experts {experts.min()} to {experts.max()} of {trace.n_expert}")
    if not experts.shape[1] <= trace.n_expert <= MAX_EXPERTS or trace.layer.min() < 0:
        raise ValueError(f"{experts.shape[1]} experts used of {trace.n_expert}")
    if len(trace.expert_bytes) * trace.n_expert**2 > MAX_PAIRS:
        raise ValueError(f"{len(trace.expert_bytes)} layers of {trace.n_expert} experts")
    if not all(0 <= layer < 1 << 31 and 0 <= size < 1 << 63 for layer, size in trace.expert_bytes.items()):
        raise ValueError("sizes out of range")
    if not set(np.unique(trace.layer).tolist()) <= trace.expert_bytes.keys():
        raise ValueError("a layer without its size")
    if not np.isin(trace.phase, (PREFILL, DECODE)).all():
        raise ValueError("a phase that is neither 0 nor 1")
    # A prompt is computed layer by layer, and may have been written in that order.
    return trace.select(np.lexsort((trace.layer, trace.step, trace.sequence)))


class Recorder:
    """Assembles a trace from what the native library records (rotary.h, rotary_pool_trace_read)."""

    def __init__(self, n_expert: int, expert_bytes: dict[int, int], about: dict[str, Any]) -> None:
        self.n_expert, self.expert_bytes, self.about = n_expert, expert_bytes, about
        self._rows: list[tuple[int, int, int, int, NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    @property
    def n_sequences(self) -> int:
        """Number of prompts of which something was recorded."""
        return len({row[0] for row in self._rows})

    def add(
        self, numbers: list[int], sequence: int, phase: int, first_step: int, n_done: int | None = None
    ) -> int:
        """Add what was recorded while tokens of one phase were computed, and return the step after them.

        `n_done` is the number of tokens that all layers computed; a later one, which failed, is left out.
        """
        flat = np.array(numbers, np.int32)
        found: dict[int, list[tuple[Any, Any, Any]]] = {layer: [] for layer in self.expert_bytes}
        at = 0
        while at < len(flat):
            layer, n_tokens, n_used, known = (int(x) for x in flat[at : at + 4])
            n = n_tokens * n_used
            ids, bits, resident = flat[at + 4 : at + 4 + 3 * n].reshape(3, n_tokens, n_used)
            weights = bits.view(np.float32) if known else np.full(ids.shape, np.nan, np.float32)
            found[layer] += zip(ids, weights, resident > 0, strict=True)
            at += 4 + 3 * n
        if n_done is not None:
            found = {layer: rows[:n_done] for layer, rows in found.items()}
        end = first_step + max(map(len, found.values()))
        for layer, rows in found.items():
            # The last layer computes only the tokens of a prompt that need logits, which are the last ones.
            for step, row in enumerate(rows, end - len(rows)):
                self._rows.append((sequence, phase, step, layer, *row))
        return end

    def trace(self) -> Trace:
        """Return the trace, ordered by token."""
        rows = sorted(self._rows, key=lambda row: row[:1] + row[2:4])
        if not rows:
            raise RotaryError("trace: nothing was routed; give a prompt of at least one token")
        head = np.array([row[:4] for row in rows], np.int32)
        n_used = max(len(row[4]) for row in rows)
        experts = np.full((len(rows), n_used), -1, np.int32)
        weights = np.full((len(rows), n_used), np.nan, np.float32)
        resident = np.zeros((len(rows), n_used), bool)
        for i, row in enumerate(rows):
            n = len(row[4])
            experts[i, :n], weights[i, :n], resident[i, :n] = row[4:]
        return Trace(
            head[:, 0], head[:, 1], head[:, 2], head[:, 3], experts, weights, resident,
            self.n_expert, self.expert_bytes, self.about,
        )  # fmt: skip
