# SPDX-License-Identifier: MIT
"""Experts and sizes of a model, and the memory that paging it needs, read from GGUF headers alone.

Works without the native library and without llama_cpp, for every architecture: an expert tensor is recognised
by its name, never by the architecture. ``Llama.rotary_stats()`` says what is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..units import mib, percent
from .header import GGUFHeader, TensorInfo, read_header

# The tensors that llama.cpp multiplies with MUL_MAT_ID. Their .bias and .scale companions stay resident.
EXPERT_TENSOR = re.compile(r"blk\.(\d{1,6})\.ffn_(?:gate|up|down|gate_up)_(exps|chexps)\.weight")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.")
MAX_EXPERTS = 1 << 16
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class LayerInfo:
    """The experts of one layer.

    A layer that also has chunk experts (GroveMoE) appears twice, once for each `kind`.
    """

    il: int
    kind: str  # "exps" or "chexps"
    n_expert: int
    n_expert_used: int
    expert_bytes: int  # of one expert, all its tensors
    types: tuple[str, ...]  # quantisations of its tensors

    @property
    def layer_bytes(self) -> int:
        """Bytes of all experts of the layer."""
        return self.n_expert * self.expert_bytes

    @property
    def chosen_bytes(self) -> int:
        """Bytes of the experts that a token uses."""
        return self.n_expert_used * self.expert_bytes


@dataclass(frozen=True)
class ModelInfo:
    """Architecture, experts and sizes of a GGUF model, all its shards together.

    Attributes
    ----------
    path : Path
        The file that was asked for, the first shard of a split model.
    n_expert, n_expert_used : int
        Largest over layers; 0 for a dense model.
    expert_bytes : int
        Bytes of all experts, which is what can be paged.
    resident_bytes : int
        Bytes of all other weights, which stay resident.
    min_budget_bytes : int
        One token's experts in every layer: the smallest budget that can work.
    layers : tuple of LayerInfo
        Layers with experts only.
    """

    path: Path
    files: tuple[Path, ...]
    architecture: str
    name: str
    n_layer: int
    n_ctx_train: int
    file_bytes: int
    n_expert: int
    n_expert_used: int
    expert_bytes: int
    resident_bytes: int
    min_budget_bytes: int
    layers: tuple[LayerInfo, ...]

    @property
    def is_moe(self) -> bool:
        """Whether the model has experts that can be paged."""
        return bool(self.layers)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ModelInfo:
        """Read the headers of a model's files.

        Raises
        ------
        ModelError
            A file is missing, truncated or not a GGUF, or `path` is not the first shard of a split model.
        """
        return cls.of(read_shards(path))

    @classmethod
    def of(cls, headers: Sequence[GGUFHeader]) -> ModelInfo:
        """Make a `ModelInfo` from the headers of a model's files, the first shard first.

        Raises
        ------
        ModelError
            The tensors of a layer's experts disagree.
        """
        metadata = headers[0].metadata
        arch = str(metadata.get("general.architecture", "unknown"))
        n_layer, tensors = loaded(headers)
        layers = _expert_layers(tensors, _used(headers[0], f"{arch}.expert_used_count"))
        expert_bytes = sum(layer.layer_bytes for layer in layers)
        return cls(
            path=headers[0].path,
            files=tuple(header.path for header in headers),
            architecture=arch,
            name=str(metadata.get("general.name", headers[0].path.stem)),
            n_layer=n_layer,
            n_ctx_train=_number(headers[0], f"{arch}.context_length", 0),
            file_bytes=sum(header.n_bytes for header in headers),
            n_expert=max((layer.n_expert for layer in layers), default=0),
            n_expert_used=max((layer.n_expert_used for layer in layers), default=0),
            expert_bytes=expert_bytes,
            resident_bytes=sum(tensor.n_bytes for tensor in tensors) - expert_bytes,
            min_budget_bytes=sum(layer.chosen_bytes for layer in layers),
            layers=layers,
        )

    def describe(self) -> str:
        """Describe the model in a few lines of text; consecutive layers that are alike share a line."""
        lines = [
            f"{self.path.name}: {self.name}, {self.architecture}, {self.n_layer} layers, "
            f"{mib(self.file_bytes)} in {len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        ]
        if not self.is_moe:
            return "\n".join([*lines, "dense model: paging does not apply"])
        lines += [
            f"experts         {mib(self.expert_bytes):>14}, can be paged",
            f"other weights   {mib(self.resident_bytes):>14}, stay resident",
            f"minimum budget  {mib(self.min_budget_bytes):>14} "
            f"({percent(self.min_budget_bytes / self.expert_bytes)} of the experts)",
        ]
        runs: list[list[LayerInfo]] = []
        for layer in self.layers:
            if runs and replace(runs[-1][-1], il=layer.il) == layer:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        for run in runs:
            one = run[0]
            which = f"layer {one.il}" if len(run) == 1 else f"layers {one.il}-{run[-1].il}"
            lines.append(
                f"{which}: {one.n_expert} experts, {one.n_expert_used} used per token, "
                f"{mib(one.expert_bytes, 3)} each, {mib(one.layer_bytes)} per layer, "
                f"{' and '.join(one.types)}"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain dicts, lists, strings and numbers, for JSON."""
        plain = asdict(self)
        plain["path"] = str(self.path)
        plain["files"] = [str(file) for file in self.files]
        plain["is_moe"] = self.is_moe
        plain["layers"] = [{**asdict(layer), "layer_bytes": layer.layer_bytes} for layer in self.layers]
        return plain


def read_shards(path: str | os.PathLike[str]) -> list[GGUFHeader]:
    """Read the headers of all files of a model, given the path of the first.

    Raises
    ------
    ModelError
        A file is missing, truncated or not a GGUF, or `path` is not the first shard of a split model.
    """
    path = Path(path)
    first = read_header(path)
    n_split = _number(first, "split.count", 0)
    if n_split < 2:
        return [first]
    number = _number(first, "split.no", 0)
    match = SHARD.fullmatch(path.name)
    if number != 0:
        raise ModelError(f"{path}: shard {number + 1} of {n_split}; give the first shard")
    if match is None or int(match[3]) != n_split:
        raise ModelError(
            f"{path}: first of {n_split} shards, but renamed; llama.cpp finds the others by "
            f"<name>-00001-of-{n_split:05d}.gguf; rename them back"
        )
    rest = [path.with_name(f"{match[1]}-{i:05d}-of-{n_split:05d}.gguf") for i in range(2, n_split + 1)]
    headers = [first, *(read_header(shard) for shard in rest)]
    for i, header in enumerate(headers):
        if header.metadata.get("split.no") != i:
            raise ModelError(
                f"{header.path}: split.no is {str(header.metadata.get('split.no'))[:40]}, {i} is expected; "
                "download this shard again"
            )
    n_tensors = sum(len(header.tensors) for header in headers)
    if n_tensors != (n_expected := _number(first, "split.tensors.count", 0)):
        raise ModelError(
            f"{path}: {n_tensors} tensors in {n_split} shards, {n_expected} are expected; some shard is from "
            "another model; download them again"
        )
    return headers


def loaded(headers: Sequence[GGUFHeader]) -> tuple[int, list[TensorInfo]]:
    """Number of layers and tensors that llama.cpp loads, without the layers for multi-token prediction."""
    arch = headers[0].metadata.get("general.architecture", "unknown")
    n_layer = _number(headers[0], f"{arch}.block_count", 0)
    n_extra = _number(headers[0], f"{arch}.nextn_predict_layers", 0)
    tensors = [tensor for header in headers for tensor in header.tensors]
    if 0 < n_extra < n_layer:
        n_layer -= n_extra
        tensors = [
            tensor
            for tensor in tensors
            if (match := _BLOCK.match(tensor.name)) is None or int(match[1]) < n_layer
        ]
    return n_layer, tensors


def _number(header: GGUFHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not _is_count(value):
        raise _wrong(header, key, value)
    return int(value)


def _used(header: GGUFHeader, key: str) -> int | list[int]:
    """Number of experts used: one for all layers, or one for each."""
    value = header.metadata.get(key, 1)
    if isinstance(value, list) and all(map(_is_count, value)):
        return value
    if not _is_count(value):
        raise _wrong(header, key, value)
    return int(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _wrong(header: GGUFHeader, key: str, value: object) -> ModelError:
    return ModelError(
        f"{header.path}: {key} is {str(value)[:40]!r}; a whole number is expected; convert the model again"
    )


def _expert_layers(tensors: list[TensorInfo], used: int | list[int]) -> tuple[LayerInfo, ...]:
    groups: dict[tuple[int, str], list[TensorInfo]] = {}
    for tensor in tensors:
        match = EXPERT_TENSOR.fullmatch(tensor.name)
        if match and len(tensor.shape) == 3:
            groups.setdefault((int(match[1]), match[2]), []).append(tensor)
    layers = []
    for (il, kind), group in sorted(groups.items()):
        n_expert = group[0].shape[2]
        if not 1 <= n_expert <= MAX_EXPERTS or sum(tensor.n_bytes for tensor in group) < n_expert:
            raise ModelError(
                f"layer {il}: {n_expert} experts in {sum(tensor.n_bytes for tensor in group)} bytes; "
                f"1 to {MAX_EXPERTS} of a byte or more are possible; convert the model again"
            )
        if any(tensor.shape[2] != n_expert for tensor in group):
            shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in group)
            raise ModelError(
                f"layer {il}: its expert tensors disagree, {shapes}; "
                "the last dimension is the number of experts; convert the model again"
            )
        n_used = used if isinstance(used, int) else used[il] if il < len(used) else max(used, default=1)
        layers.append(
            LayerInfo(
                il=il,
                kind=kind,
                n_expert=n_expert,
                n_expert_used=max(1, min(n_used, n_expert)),
                expert_bytes=sum(tensor.n_bytes for tensor in group) // n_expert,
                types=tuple(sorted({tensor.type_name for tensor in group})),
            )
        )
    return tuple(layers)
