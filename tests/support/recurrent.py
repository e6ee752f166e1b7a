# SPDX-License-Identifier: MIT
"""Small random models with a recurrent state: a mamba, and a jamba, which has attention and experts too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from models.plan import Shape
from models.synth import add_metadata
from tests.support import write_all

N_EMBD, N_INNER, N_STATE, N_CONV, N_RANK, N_FF, N_EXPERT = 64, 128, 16, 4, 8, 96, 16
SHAPE = Shape("mamba", 2, N_EMBD, 4, 2, 16, N_FF, N_EXPERT, 4, 512, 512, 1e6)


def write(path: Path, hybrid: bool, seed: int = 0) -> Path:
    """Write a mamba, or if `hybrid` a jamba of one mamba and one attention layer, both with experts."""
    arch = "jamba" if hybrid else "mamba"
    writer = GGUFWriter(path, arch)
    add_metadata(writer, SHAPE, arch)
    if not hybrid:
        for name in ("expert_count", "expert_used_count"):
            del writer.kv_data[0][f"{arch}.{name}"]
    heads = writer.kv_data[0][f"{arch}.attention.head_count_kv"]
    heads.value, heads.type, heads.sub_type = (
        [0, 2 if hybrid else 0],
        GGUFValueType.ARRAY,
        GGUFValueType.INT32,
    )
    writer.add_ssm_conv_kernel(N_CONV)
    writer.add_ssm_inner_size(N_INNER)
    writer.add_ssm_state_size(N_STATE)
    writer.add_ssm_time_step_rank(N_RANK)
    rng = np.random.default_rng(seed)

    def add(name: str, *shape: int, value: Any = None) -> None:
        made = rng.normal(size=shape) / np.sqrt(shape[-1]) if value is None else np.broadcast_to(value, shape)
        writer.add_tensor(name, np.ascontiguousarray(made, np.float32))

    add("token_embd.weight", SHAPE.vocab, N_EMBD)
    add("output.weight", SHAPE.vocab, N_EMBD)
    add("output_norm.weight", N_EMBD, value=1)
    for il in range(SHAPE.layers):
        blk = f"blk.{il}"
        add(f"{blk}.attn_norm.weight", N_EMBD, value=1)
        if hybrid and il == 1:
            for name, n_out in (("q", 64), ("k", 32), ("v", 32), ("output", 64)):
                add(f"{blk}.attn_{name}.weight", n_out, N_EMBD)
        else:
            add(f"{blk}.ssm_in.weight", 2 * N_INNER, N_EMBD)
            add(f"{blk}.ssm_conv1d.weight", N_INNER, N_CONV)
            add(f"{blk}.ssm_conv1d.bias", N_INNER, value=0)
            add(f"{blk}.ssm_x.weight", N_RANK + 2 * N_STATE, N_INNER)
            add(f"{blk}.ssm_dt.weight", N_INNER, N_RANK)
            add(f"{blk}.ssm_dt.bias", N_INNER, value=0)
            add(f"{blk}.ssm_a", N_INNER, N_STATE, value=-np.arange(1, N_STATE + 1) / N_STATE)
            add(f"{blk}.ssm_d", N_INNER, value=1)
            add(f"{blk}.ssm_out.weight", N_EMBD, N_INNER)
            for name, n in (("dt", N_RANK), ("b", N_STATE), ("c", N_STATE)) if hybrid else ():
                add(f"{blk}.ssm_{name}_norm.weight", n, value=1)
        if hybrid:
            add(f"{blk}.ffn_norm.weight", N_EMBD, value=1)
            add(f"{blk}.ffn_gate_inp.weight", N_EXPERT, N_EMBD)
            add(f"{blk}.ffn_gate_exps.weight", N_EXPERT, N_FF, N_EMBD)
            add(f"{blk}.ffn_up_exps.weight", N_EXPERT, N_FF, N_EMBD)
            add(f"{blk}.ffn_down_exps.weight", N_EXPERT, N_EMBD, N_FF)
    write_all(writer)
    return path
