# SPDX-License-Identifier: MIT
"""Changes the types of a model's tensors with llama.cpp's own quantiser, in a process of its own.

Of its own, because llama_model_quantize() ends for no signal, and aborts the process on what it did not
expect. The process is this module; it reads one line of JSON from standard input, writes llama.cpp's log to
standard output, and ends with its parent, when standard input does. Every tensor gets a rule, so that none of
llama.cpp's mixtures is applied.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from .errors import ModelError, RotaryError
from .gguf_header import GGUFHeader, TensorInfo, read_header

TYPES = {kind.name: int(kind) for kind in GGMLQuantizationType}
_MIXTURES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}  # general.file_type
_NO_BLOCKS = ("F32", "F16", "BF16")
_EXPERTS = r"^blk\.\d+\.ffn_(gate|up|down|gate_up)(_exps|_chexps|\.\d+)\.weight$"
_BUFFER_BYTES = 256 << 20  # of rows that the quantiser holds at once; its own default is 8 GiB
_TENSOR = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\w+), ")
_CHANGED = re.compile(r"size = [^\n]* MiB -> [^\n]* MiB \((\w+)\)")


@dataclass(frozen=True)
class Wish:
    """What types are wanted; None keeps those that are there.

    Attributes
    ----------
    experts, rest : str or None
        Types as gguf names them, Q3_K say, of the experts and of all else that llama.cpp quantises.
    types : tuple of str
        ``PATTERN=TYPE``, a regular expression found in a tensor's name; the first that is found counts, and
        before the other two.
    imatrix : str or None
        A GGUF of llama-imatrix.
    """

    experts: str | None = None
    rest: str | None = None
    types: tuple[str, ...] = ()
    imatrix: str | None = None

    def __bool__(self) -> bool:
        return bool(self.experts or self.rest or self.types)

    def __str__(self) -> str:
        parts = [f"{name} {kind}" for name, kind in (("experts", self.experts), ("rest", self.rest)) if kind]
        parts += self.types
        return ", ".join([*parts, f"imatrix {Path(self.imatrix).name}"] if self.imatrix else parts)


def type_number(name: str) -> int:
    """Of a type's name in either case.

    Raises
    ------
    RotaryError
        There is no such type.
    """
    if name.upper() not in TYPES:
        raise RotaryError(
            f"type {name!r}: unknown; those of a single tensor are {', '.join(TYPES)}; give one of them"
        )
    return TYPES[name.upper()]


def rules(wish: Wish, headers: Sequence[GGUFHeader]) -> list[tuple[str, int]]:
    """Patterns and types for the quantiser: the first that matches counts, and one matches each tensor."""
    made = []
    for text in wish.types:
        pattern, equals, kind = text.rpartition("=")
        try:
            re.compile(pattern)
        except re.error as error:
            raise RotaryError(
                f"{text}: {error}; a regular expression is wanted before '='; mend it"
            ) from None
        if not equals or not pattern:
            raise RotaryError(f"{text}: no type for a pattern; PATTERN=TYPE is wanted; write it so")
        made.append((pattern, type_number(kind)))
    for tensor in (tensor for header in headers for tensor in header.tensors):
        is_expert = re.search(_EXPERTS, tensor.name) is not None
        if (wish.experts if is_expert else wish.rest) is None:
            made.append((f"^{re.escape(tensor.name)}$", tensor.type_number))
    if wish.experts:
        made.append((_EXPERTS, type_number(wish.experts)))
    if wish.rest:
        made.append((".*", type_number(wish.rest)))
    return made


def announced(wish: Wish) -> int | None:
    """What general.file_type becomes: the experts' type, else the rest's; None with patterns alone."""
    kind = wish.experts or wish.rest
    if kind is None:
        return None
    name = _MIXTURES.get(kind.upper(), kind.upper())
    return int(LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])


def _heeding(wish: Wish) -> str:
    """A file type to call the quantiser with, which heeds rules only where that has blocks."""
    for kind in (wish.experts, wish.rest, *(text.rpartition("=")[2] for text in wish.types)):
        if kind and kind.upper() not in _NO_BLOCKS:
            return _MIXTURES.get(kind.upper(), kind.upper())
    return "Q8_0"


def _request(wish: Wish, headers: Sequence[GGUFHeader], target: Path, dry_run: bool) -> dict[str, Any]:
    return {
        "source": str(headers[0].path),
        "target": str(target),
        "rules": rules(wish, headers),
        "file_type": _heeding(wish),
        "imatrix": wish.imatrix,
        "dry_run": dry_run,
        # It pads to 32 whatever the source's metadata says, and would say what that says.
        "realign": headers[0].alignment != 32,
    }


def quantise(
    wish: Wish, headers: Sequence[GGUFHeader], target: Path, progress: Callable[[int], object]
) -> None:
    """Write the model with other types to one file; `progress` is called with bytes of the source.

    Raises
    ------
    ModelError
        llama.cpp does not read or quantise this model.
    """
    sizes = {tensor.name: tensor.n_bytes for header in headers for tensor in header.tensors}
    before: list[str] = []

    def on_tensor(name: str) -> None:
        if before:
            progress(sizes.get(before[-1], 0))
        before.append(name)

    _run(_request(wish, headers, target, False), headers[0].path, on_tensor)


def planned(wish: Wish, headers: Sequence[GGUFHeader]) -> GGUFHeader:
    """What `quantise` will write, as far as a layout needs it; llama.cpp itself says the types.

    Raises
    ------
    ModelError
        llama.cpp does not read this model, or quantises it only with an importance matrix.
    """
    log = _run(_request(wish, headers, Path(os.devnull), True), headers[0].path, lambda _: None)
    kinds = {}
    begun = [*_TENSOR.finditer(log)]
    for match, following in zip(begun, [*begun[1:], None], strict=True):
        changed = _CHANGED.search(log, match.end(), following.start() if following else len(log))
        kinds[match[1]] = type_number(changed[1] if changed else match[2])
    if "will require an imatrix" in log:
        raise RotaryError(
            f"{headers[0].path}: {wish} needs an importance matrix; types of so few bits are useless else; "
            "give --imatrix, or a larger type"
        )
    tensors, at = [], 0
    for tensor in (tensor for header in headers for tensor in header.tensors):
        number = kinds.get(tensor.name, tensor.type_number)
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        n_bytes = prod(tensor.shape) // block * block_bytes
        tensors.append(TensorInfo(tensor.name, tensor.shape, kind.name, at, n_bytes, number))
        at += n_bytes
    return replace(headers[0], tensors=tuple(tensors), n_bytes=at)


def changes(before: Sequence[GGUFHeader], after: GGUFHeader) -> list[str]:
    """Lines on what changes: how many tensors from what to what, and what is lost twice."""
    kinds = {tensor.name: tensor.type_name for header in before for tensor in header.tensors}
    counts: dict[tuple[str, str], int] = {}
    for tensor in after.tensors:
        pair = (kinds[tensor.name], tensor.type_name)
        counts[pair] = counts.get(pair, 0) + (pair[0] != pair[1])
    lines = [f"                {n} tensors {a} -> {b}" for (a, b), n in sorted(counts.items()) if n]
    if any(n and a not in _NO_BLOCKS for (a, _), n in counts.items()):
        lines.append("                quantised before: what that lost stays lost; the original gives better")
    return lines or ["                no tensor changes: all are of these types"]


def _run(request: Mapping[str, Any], model: Path, on_tensor: Callable[[str], None]) -> str:
    process = subprocess.Popen(
        [sys.executable, "-m", "rotary_llamacpp.quantising"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # So that Ctrl-C comes to the parent alone, which ends this one.
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    log = ""
    try:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        seen = 0
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            log += chunk.decode("utf-8", "replace")
            for match in _TENSOR.finditer(log, seen):
                on_tensor(match[1])
                seen = match.end()
        process.wait()
    finally:
        process.kill()
        process.communicate()
    if process.returncode != 0:
        said = [line for line in log.splitlines() if "failed to quantize" in line or "Error: " in line]
        why = said[-1].strip() if said else f"the quantiser ended with status {process.returncode}"
        raise ModelError(
            f"{model}: not quantised, {why}; llama.cpp quantises models it can load; check model and types"
        )
    return log


# ---- the process -------------------------------------------------------------------------------------


def load_imatrix(path: str) -> dict[str, np.ndarray]:
    """Weights of columns by tensor: sums of squares over counts, as llama-quantize takes them.

    A tensor of experts has also the names that its experts have one by one.
    """
    header = read_header(path)
    sums: dict[str, np.ndarray] = {}
    for tensor in header.tensors:
        if tensor.type_name == "F32":
            values = np.fromfile(path, np.float32, prod(tensor.shape), offset=tensor.offset)
            sums[tensor.name] = values
    found = {}
    for name in (name.removesuffix(".in_sum2") for name in sums if name.endswith(".in_sum2")):
        counts = np.round(sums.get(f"{name}.counts", np.zeros(1, np.float32)))[:, None]
        values = sums[f"{name}.in_sum2"].reshape(len(counts), -1)
        means = np.where(counts > 0, values / np.maximum(counts, 1), 1).astype(np.float32)
        found[name] = np.ascontiguousarray(means.reshape(-1))
        if "_exps.weight" in name:
            for expert, row in enumerate(means):
                found[name.replace("_exps.weight", f".{expert}.weight")] = np.ascontiguousarray(row)
    if not found:
        raise ModelError(
            f"{path}: no importance matrix; a GGUF of llama-imatrix has tensors named *.in_sum2; "
            "make one, or an old .dat new with `llama-imatrix --in-file`"
        )
    return found


def _main(request: dict[str, Any]) -> int:
    import llama_cpp.llama_cpp as api

    @api.llama_log_callback
    def log(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        os.write(1, text)

    def die_with_parent() -> None:
        os.read(0, 1)  # past Python's own buffer, which its end would wait for
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()
    api.llama_log_set(log, ctypes.c_void_p(0))
    params = api.llama_model_quantize_default_params()
    params.nthread = len(os.sched_getaffinity(0))
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{request['file_type']}")
    params.allow_requantize = True
    params.dry_run = request["dry_run"]
    params.max_buf_size = _BUFFER_BYTES
    tensors = (api.llama_model_tensor_override * (len(request["rules"]) + 1))()
    for entry, (pattern, kind) in zip(tensors, request["rules"], strict=False):
        entry.pattern, entry.type = pattern.encode(), kind
    params.tt_overrides = tensors
    if request["realign"]:
        keys = (api.llama_model_kv_override * 2)()
        value: Any = api.llama_model_kv_override_value(val_i64=32)
        keys[0].tag, keys[0].key = api.LLAMA_KV_OVERRIDE_TYPE_INT, b"general.alignment"
        keys[0].value = value
        params.kv_overrides = keys
    if request["imatrix"]:
        data = load_imatrix(request["imatrix"])
        entries = (api.llama_model_imatrix_data * (len(data) + 1))()
        for column, (name, values) in zip(entries, data.items(), strict=False):
            column.name, column.size = name.encode(), values.size
            column.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    return int(
        api.llama_model_quantize(request["source"].encode(), request["target"].encode(), ctypes.byref(params))
    )


if __name__ == "__main__":
    try:
        sys.exit(_main(json.loads(sys.stdin.buffer.readline())))
    except RotaryError as error_:
        sys.exit(f"Error: {error_}")
