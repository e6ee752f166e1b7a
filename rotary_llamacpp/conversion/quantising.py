# SPDX-License-Identifier: MIT
"""Changes the types of a model's tensors with llama.cpp's own quantiser, in a child process.

llama_model_quantize() cannot be interrupted and aborts on unexpected input, hence the child process. It runs
this module, reads JSON from standard input and writes llama.cpp's log to standard output. Every tensor gets a
rule, so that none of llama.cpp's mixtures is applied.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from ..errors import ModelError, RotaryError
from ..gguf_files import imatrices
from ..gguf_files.header import GGUFHeader, TensorInfo
from ..host.children import child
from ..host.machine import cpu_count
from ..units import MIB

# ggml_quantize_chunk() aborts for these.
_NO_QUANTISER = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
TYPES = {kind.name: int(kind) for kind in GGMLQuantizationType if kind.name not in _NO_QUANTISER}
_MIXTURES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4": "MXFP4_MOE"}  # general.file_type
_NO_BLOCKS = ("F32", "F16", "BF16")
_OURS = "Error: "  # prefix of this module's lines in the log; llama.cpp has none like it
_EXPERTS = r"^blk\.\d+\.ffn_(gate|up|down|gate_up)(_exps|_chexps|\.\d+)\.weight$"
_BUFFER_BYTES = 256 * MIB  # of rows that the quantiser holds at once; the default is 8 GiB
_TENSOR = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[")
_CHANGED = re.compile(r"size = [^\n]* MiB -> [^\n]* MiB \((\w+)\)")


@dataclass(frozen=True)
class Wish:
    """Types to quantise tensors to; None keeps the type that a tensor has.

    Attributes
    ----------
    experts, rest : str or None
        Types as gguf names them, such as Q3_K, of the experts and of everything else that llama.cpp
        quantises.
    types : tuple of str
        ``PATTERN=TYPE`` with a regular expression to search in tensor names; the first match wins, and goes
        before `experts` and `rest`.
    imatrix : str or None
        Importance matrix, a GGUF from llama-imatrix.
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
    """Number of a ggml type, by name in upper or lower case.

    Raises
    ------
    RotaryError
        Nothing can be quantised to a type of that name.
    """
    if name.upper() not in TYPES:
        raise RotaryError(f"type {name!r}: not a type to quantise tensors to; give one of {', '.join(TYPES)}")
    return TYPES[name.upper()]


def patterns(wish: Wish) -> list[tuple[str, int]]:
    """Check a wish; return the patterns of `types`, each with the number of its type.

    Raises
    ------
    RotaryError
        A type or a pattern is not valid, or nothing is to be quantised.
    """
    if wish.imatrix and not wish:
        raise RotaryError(
            f"{wish.imatrix}: an importance matrix is for quantising; give --experts, --rest or --type too"
        )
    for kind in (wish.experts, wish.rest):
        if kind is not None:
            type_number(kind)
    made = []
    for text in wish.types:
        pattern, equals, kind = text.rpartition("=")
        try:
            re.compile(pattern)
        except re.error as error:
            raise RotaryError(f"{text}: {error}; write a regular expression before '='") from None
        if not equals or not pattern:
            raise RotaryError(f"{text}: has no type; write PATTERN=TYPE")
        made.append((pattern, type_number(kind)))
    return made


def rules(wish: Wish, headers: Sequence[GGUFHeader]) -> list[tuple[str, int]]:
    """Make the quantiser's rules, pattern and type; every tensor matches one, and the first match wins."""
    made = patterns(wish)
    tensors = [tensor for header in headers for tensor in header.tensors]
    for pattern, _ in made:
        if not any(re.search(pattern, tensor.name) for tensor in tensors):
            raise RotaryError(
                f"{headers[0].path}: {pattern!r} matches no tensor; gguf-dump shows names of tensors"
            )
    for tensor in tensors:
        is_expert = re.search(_EXPERTS, tensor.name) is not None
        if (wish.experts if is_expert else wish.rest) is None:
            made.append((f"^{re.escape(tensor.name)}$", tensor.type_number))
    if wish.experts:
        made.append((_EXPERTS, type_number(wish.experts)))
    if wish.rest:
        made.append((".*", type_number(wish.rest)))
    return made


def announced(wish: Wish) -> int | None:
    """Value of general.file_type: the type of the experts, else of the rest; None with patterns alone."""
    kind = wish.experts or wish.rest
    if kind is None:
        return None
    name = _MIXTURES.get(kind.upper(), kind.upper())
    return int(LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"])


def _file_type(wish: Wish) -> str:
    """Name of a file type to call the quantiser with; it applies rules only if that type has blocks."""
    for kind in (wish.experts, wish.rest, *(text.rpartition("=")[2] for text in wish.types)):
        if kind and kind.upper() not in _NO_BLOCKS:
            return _MIXTURES.get(kind.upper(), kind.upper())
    return "Q8_0"


def _request(wish: Wish, headers: Sequence[GGUFHeader], target: Path, dry_run: bool) -> dict[str, Any]:
    return {
        "source": str(headers[0].path),
        "target": str(target),
        "rules": rules(wish, headers),
        "file_type": _file_type(wish),
        "imatrix": wish.imatrix,
        "dry_run": dry_run,
        # The quantiser aligns to 32, but would copy another general.alignment from the source.
        "realign": headers[0].alignment != 32,
    }


def quantise(
    wish: Wish, headers: Sequence[GGUFHeader], target: Path, progress: Callable[[int], object]
) -> None:
    """Quantise the model into one file; `progress` gets bytes of the source.

    Raises
    ------
    ModelError
        llama.cpp cannot read or quantise this model.
    """
    sizes = {tensor.name: tensor.n_bytes for header in headers for tensor in header.tensors}
    before: list[str] = []

    def on_tensor(name: str) -> None:
        if before:
            progress(sizes.get(before[-1], 0))
        before.append(name)

    _run(_request(wish, headers, target, False), headers[0].path, on_tensor)


def planned(wish: Wish, headers: Sequence[GGUFHeader]) -> tuple[GGUFHeader | None, list[str]]:
    """Predict the header that `quantise` will write; return it with lines of text on what changes.

    The header is None if nothing changes. llama.cpp itself decides the types, in a dry run.

    Raises
    ------
    ModelError
        llama.cpp cannot read this model, or the importance matrix is not valid.
    RotaryError
        llama.cpp needs an importance matrix for these types, or the matrix given does not fit.
    """
    log = _run(_request(wish, headers, Path(os.devnull), True), headers[0].path, lambda _: None)
    kinds = {}
    begun = [*_TENSOR.finditer(log)]
    for match, following in zip(begun, [*begun[1:], None], strict=True):
        if changed := _CHANGED.search(log, match.end(), following.start() if following else len(log)):
            kinds[match[1]] = type_number(changed[1])
    if not kinds:
        return None, [
            f"{' ' * 16}no tensor changes: all have these types, or llama.cpp does not quantise them"
        ]
    if "will require an imatrix" in log:
        raise RotaryError(
            f"{headers[0].path}: {wish} needs an importance matrix; give --imatrix, or a larger type"
        )
    tensors, changing, at = [], [], 0
    counts: dict[tuple[str, str], int] = {}
    for tensor in (tensor for header in headers for tensor in header.tensors):
        number = kinds.get(tensor.name, tensor.type_number)
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        n_bytes = prod(tensor.shape) // block * block_bytes
        tensors.append(TensorInfo(tensor.name, tensor.shape, kind.name, at, n_bytes, number))
        at += n_bytes
        if tensor.name in kinds:
            changing.append(tensors[-1])
            pair = (tensor.type_name, kind.name)
            counts[pair] = counts.get(pair, 0) + 1
    lines = [f"{n} tensors {a} -> {b}" for (a, b), n in sorted(counts.items())]
    if wish.imatrix:
        lines.append(imatrices.coverage(wish.imatrix, changing))
    if any(before not in _NO_BLOCKS for before, _ in counts):
        lines.append("already quantised: the lost precision stays lost; better start from the original")
    return replace(headers[0], tensors=tuple(tensors), n_bytes=at), [" " * 16 + line for line in lines]


def _run(request: Mapping[str, Any], model: Path, on_tensor: Callable[[str], None]) -> str:
    log, seen = "", 0
    with child(__name__, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            log += chunk.decode("utf-8", "replace")
            for match in _TENSOR.finditer(log, seen):
                on_tensor(match[1])
                seen = match.end()
        process.wait()
    if "iostream error" in log:
        raise RotaryError(
            f"{request['target']}: cannot be written, {_last(log, 'iostream error')}; the quantised "
            "model is written there first; free some space, and convert again"
        )
    if process.returncode != 0 and (ours := _last(log, _OURS)):
        raise RotaryError(ours.removeprefix(_OURS))
    if process.returncode != 0:
        said = _last(log, "failed to quantize", "GGML_ASSERT")
        why = said or f"the quantiser ended with status {process.returncode}"
        raise ModelError(f"{model}: not quantised, {why}; check model and types")
    return log


def _last(log: str, *words: str) -> str:
    """Last line of a log that has one of these words."""
    said = [line.strip() for line in log.splitlines() if any(word in line for word in words)]
    return said[-1] if said else ""


# ---- the process -------------------------------------------------------------------------------------


def _main(request: dict[str, Any]) -> int:
    from ..native.stock import llama_api as api

    @api.llama_log_callback
    def log(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        os.write(1, text)

    api.llama_log_set(log, ctypes.c_void_p(0))
    params = api.llama_model_quantize_default_params()
    params.nthread = cpu_count()
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
        data = imatrices.load(request["imatrix"])
        entries = (api.llama_model_imatrix_data * (len(data) + 1))()
        for column, (name, values) in zip(entries, data.items(), strict=False):
            column.name, column.size = name.encode(), values.size
            column.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = entries
    return int(
        api.llama_model_quantize(
            os.fsencode(request["source"]), os.fsencode(request["target"]), ctypes.byref(params)
        )
    )


if __name__ == "__main__":
    try:
        sys.exit(_main(json.load(sys.stdin)))
    except RotaryError as error_:
        sys.exit(f"{_OURS}{error_}")
