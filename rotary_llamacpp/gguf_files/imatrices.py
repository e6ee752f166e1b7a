# SPDX-License-Identifier: MIT
"""Reads importance matrices from llama-imatrix, and checks that they fit the model to be quantised."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from ..errors import ModelError, RotaryError
from .header import TensorInfo, read_header

# Types that need a matrix, except for the tensors in _ENDS.
_WITH_ONE_ONLY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
_ENDS = ("token_embd.weight", "output.weight")


def load(path: str) -> dict[str, np.ndarray]:
    """Read the weights of columns by tensor: sums of squares over counts, as llama-quantize takes them.

    The rows of a tensor of experts are also listed under the names of single experts' tensors.
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
        values = sums[f"{name}.in_sum2"]
        if not len(counts) or values.size % len(counts):
            raise ModelError(
                f"{path}: {values.size} sums and {len(counts)} counts of {name}, which do not match; "
                "make the matrix again"
            )
        values = values.reshape(len(counts), -1)
        means = np.where(counts > 0, values / np.maximum(counts, 1), 1).astype(np.float32)
        found[name] = np.ascontiguousarray(means.reshape(-1))
        if "_exps.weight" in name:
            for expert, row in enumerate(means):
                found[name.replace("_exps.weight", f".{expert}.weight")] = np.ascontiguousarray(row)
    if not found:
        raise ModelError(
            f"{path}: not an importance matrix; llama-imatrix writes tensors named *.in_sum2; "
            "make one, or convert an old .dat with `llama-imatrix --in-file`"
        )
    return found


def coverage(path: str, changing: Sequence[TensorInfo]) -> str:
    """Say in one line how many of the tensors that change are in an importance matrix.

    llama.cpp notices a wrong size only when it reaches that tensor, and never that no name matches.

    Raises
    ------
    RotaryError
        The matrix does not fit the model, or lacks a tensor that cannot be quantised without it.
    """
    data = load(path)
    n_known = 0
    for tensor in changing:
        n_wanted = tensor.shape[0] * prod(tensor.shape[2:])
        n_found = data[tensor.name].size if tensor.name in data else 0
        n_known += n_found == n_wanted
        if n_found not in (0, n_wanted) and tensor.name not in _ENDS:
            raise RotaryError(
                f"{path}: {n_found} values for {tensor.name}, which has {n_wanted} columns; the matrix is "
                "for another model; make one for this model"
            )
        if not n_found and tensor.type_name in _WITH_ONE_ONLY and tensor.name not in _ENDS:
            raise RotaryError(
                f"{path}: no values for {tensor.name}, which {tensor.type_name} needs; make a "
                "matrix from more text, or give that tensor a larger type"
            )
    if not n_known:
        raise RotaryError(
            f"{path}: has none of the {len(changing)} tensors that change; the matrix is for another model; "
            "make one for this model, or leave it out"
        )
    return f"importance matrix for {n_known} of {len(changing)} tensors"
