# SPDX-License-Identifier: MIT
"""Names and types of the keyword arguments of stock's constructor, so that editors complete ours.

A test holds them against the installed llama_cpp. At run time nothing here restricts what is passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from ..config import RotaryConfig
from ..native.stock import llama_chat_format, llama_speculative, llama_tokenizer

Rotary = RotaryConfig | Mapping[str, Any] | str | int | float | None


class LlamaOptions(TypedDict, total=False):
    """Keyword arguments of llama_cpp.Llama, which explains them. Those that are left out are as in stock."""

    # model
    n_gpu_layers: int
    split_mode: int
    main_gpu: int
    tensor_split: list[float] | None
    vocab_only: bool
    use_mmap: bool
    use_mlock: bool
    kv_overrides: dict[str, bool | int | float | str] | None
    # context
    seed: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int | None
    n_threads_batch: int | None
    rope_scaling_type: int | None
    pooling_type: int
    attention_type: int
    rope_freq_base: float
    rope_freq_scale: float
    yarn_ext_factor: float
    yarn_attn_factor: float
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_orig_ctx: int
    logits_all: bool
    embedding: bool
    offload_kqv: bool
    flash_attn: bool
    op_offload: bool | None
    swa_full: bool | None
    # sampling
    no_perf: bool
    last_n_tokens_size: int
    # LoRA
    lora_base: str | None
    lora_scale: float
    lora_path: str | None
    # backend
    numa: bool | int
    # chat
    chat_format: str | None
    chat_handler: llama_chat_format.LlamaChatCompletionHandler | None
    # speculative decoding
    draft_model: llama_speculative.LlamaDraftModel | None
    # tokenizer
    tokenizer: llama_tokenizer.BaseLlamaTokenizer | None
    # types of the KV cache
    type_k: int | None
    type_v: int | None
    # other
    spm_infill: bool
    verbose: bool
