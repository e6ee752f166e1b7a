# SPDX-License-Identifier: MIT
"""Orders the tensors of a model for paging, as ranges of bytes of its files.

Everything that is not an expert comes first, in the files' order, then the experts, layer by layer. Where a
model has one tensor for each expert, these are joined. Impossible tensors are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import ModelError
from .header import GGUFHeader, TensorInfo
from .info import EXPERT_TENSOR, MAX_EXPERTS

# As in Mixtral files from before April 2024.
_ONE_EXPERT = re.compile(r"(blk\.(\d{1,6})\.ffn_(?:gate|up|down))\.(\d{1,6})\.weight")


@dataclass(frozen=True)
class Piece:
    """Bytes of one source file."""

    source: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Weight:
    """One tensor of the result and the pieces of the sources that it is made of, in order.

    `layer` is None for a tensor that stays resident. `shape` is in ggml's order.
    """

    name: str
    shape: tuple[int, ...]
    type_number: int
    type_name: str
    pieces: tuple[Piece, ...]
    layer: int | None

    @property
    def n_bytes(self) -> int:
        """Bytes without padding."""
        return sum(piece.n_bytes for piece in self.pieces)

    @property
    def n_expert(self) -> int:
        """Number of experts; 1 for a tensor that stays resident."""
        return self.shape[2] if self.layer is not None else 1


def weights_of(headers: Sequence[GGUFHeader]) -> list[Weight]:
    """Weights of the result in order, from the headers of the sources; tensors of single experts are joined.

    Raises
    ------
    ModelError
        Tensors overlap, appear twice, or an expert is missing or unlike the others.
    """
    found: dict[str, Weight] = {}
    single: dict[str, dict[int, tuple[int, TensorInfo]]] = {}
    for source, header in enumerate(headers):
        _check(header)
        for tensor in header.tensors:
            if match := _ONE_EXPERT.fullmatch(tensor.name):
                name = f"{match[1]}_exps.weight"
                experts = single.setdefault(name, {})
                if int(match[3]) in experts:
                    raise _twice(header.path, tensor.name)
                experts[int(match[3])] = (source, tensor)
                # The joined tensor takes the place of its first expert.
                found.setdefault(name, Weight(name, (), 0, "", (), int(match[2])))
                continue
            if tensor.name in found:
                raise _twice(header.path, tensor.name)
            is_expert = EXPERT_TENSOR.fullmatch(tensor.name) if len(tensor.shape) == 3 else None
            found[tensor.name] = Weight(
                tensor.name, tensor.shape, tensor.type_number, tensor.type_name,
                (Piece(source, tensor.offset, tensor.n_bytes),), int(is_expert[1]) if is_expert else None,
            )  # fmt: skip
    for name, experts in single.items():
        if found[name].pieces:
            raise _twice(headers[0].path, name)
        found[name] = _joined(headers, name, experts)
    resident = [weight for weight in found.values() if weight.layer is None]
    experts_last = [weight for weight in found.values() if weight.layer is not None]
    return resident + sorted(experts_last, key=lambda weight: weight.layer or 0)


def _joined(headers: Sequence[GGUFHeader], name: str, experts: dict[int, tuple[int, TensorInfo]]) -> Weight:
    first = next(iter(experts.values()))[1]
    n_expert = len(experts)
    for expert in range(n_expert):
        if expert not in experts:
            raise ModelError(
                f"{headers[0].path}: {name} lacks expert {expert}, has {n_expert} others; download it again"
            )
        tensor = experts[expert][1]
        if (tensor.shape, tensor.type_number) != (first.shape, first.type_number) or len(first.shape) != 2:
            raise ModelError(
                f"{headers[0].path}: {tensor.name} is {tensor.type_name} {list(tensor.shape)}, {first.name} "
                f"{first.type_name} {list(first.shape)}; the experts of a layer are matrices of one type and "
                "shape; convert from the original, or quantise all alike"
            )
    layer = EXPERT_TENSOR.fullmatch(name)
    assert layer is not None
    pieces = tuple(Piece(experts[i][0], experts[i][1].offset, experts[i][1].n_bytes) for i in range(n_expert))
    shape = (*first.shape, n_expert)
    return Weight(name, shape, first.type_number, first.type_name, pieces, int(layer[1]))


def _check(header: GGUFHeader) -> None:
    end, before = 0, ""
    for tensor in sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if len(tensor.shape) > 4 or not 0 < prod(tensor.shape) < 1 << 63:
            raise ModelError(
                f"{header.path}: {tensor.name} is {list(tensor.shape)}; tensors have at most 4 dimensions, "
                "and 1 to 2^63 elements; download or convert it again"
            )
        if EXPERT_TENSOR.fullmatch(tensor.name) and max(tensor.shape[2:], default=1) > MAX_EXPERTS:
            raise ModelError(
                f"{header.path}: {tensor.name} is {list(tensor.shape)}; a layer has at most {MAX_EXPERTS} "
                "experts; download or convert it again"
            )
        if tensor.offset < end:
            raise ModelError(
                f"{header.path}: {tensor.name} begins at byte {tensor.offset}, {before} ends at {end}; "
                "tensors do not overlap; download or convert it again"
            )
        end, before = tensor.offset + tensor.n_bytes, tensor.name


def _twice(path: Path, name: str) -> ModelError:
    return ModelError(f"{path}: {name} appears twice; download it again")
