# SPDX-License-Identifier: MIT
"""Write a checkpoint of the tiny MoE model as a GGUF file, also while training runs.

    python -m models.tiny.export --data build/tiny-data --run build/tiny-run --out models/tiny-moe-q8_0.gguf

Matrices become Q8_0; norms and routers stay F32, since a rounded router would choose other experts. The file
gets its name when it is complete.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from gguf import GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize

from models.tiny.data import END
from models.tiny.model import Config


def add_tokenizer(writer, path):
    """Add the byte-level BPE vocabulary; ``<|endoftext|>`` is both BOS and EOS, as in the training stream."""
    model = json.loads(path.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t == END else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    end = model["vocab"][END]
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def tensors(state, config):
    """Yield (GGUF name, float array, type) in the order llama.cpp's own files have."""
    yield "token_embd.weight", state["token_embd.weight"], Q.Q8_0
    for il in range(config.n_layer):

        def get(name, prefix=f"layers.{il}."):
            return state[prefix + name]

        head = config.n_embd // config.n_head
        q, k, v = np.split(
            get("attn_qkv.weight"), [config.n_head * head, (config.n_head + config.n_head_kv) * head]
        )
        gate, up = np.split(get("w_gate_up"), 2, axis=1)
        for name, data, kind in (
            ("attn_norm", get("attn_norm.weight"), Q.F32),
            ("attn_q", q, Q.Q8_0),
            ("attn_k", k, Q.Q8_0),
            ("attn_v", v, Q.Q8_0),
            ("attn_q_norm", get("attn_q_norm.weight"), Q.F32),
            ("attn_k_norm", get("attn_k_norm.weight"), Q.F32),
            ("attn_output", get("attn_output.weight"), Q.Q8_0),
            ("ffn_norm", get("ffn_norm.weight"), Q.F32),
            ("ffn_gate_inp", get("router.weight"), Q.F32),
            ("ffn_gate_exps", gate, Q.Q8_0),
            ("ffn_up_exps", up, Q.Q8_0),
            ("ffn_down_exps", get("w_down"), Q.Q8_0),
        ):
            yield f"blk.{il}.{name}.weight", data, kind
    yield "output_norm.weight", state["output_norm.weight"], Q.F32


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--run", type=Path, required=True, help="folder with checkpoint.pt")
    parser.add_argument("--out", type=Path, required=True, help="GGUF file to write or replace")
    args = parser.parse_args()

    checkpoint = torch.load(args.run / "checkpoint.pt", map_location="cpu")
    config = Config(**checkpoint["config"])
    state = {name: value.numpy() for name, value in checkpoint["model"].items()}
    temporary = args.out.with_name(args.out.name + ".tmp")
    writer = GGUFWriter(temporary, "qwen3moe")
    writer.add_name("rotary tiny MoE")
    writer.add_description(
        f"{config.n_expert} experts, {config.n_expert_used} used; King James Bible and Jane Austen, "
        f"{checkpoint['step']} steps"
    )
    writer.add_license("MIT")
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.n_vocab)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff * config.n_expert_used)
    writer.add_expert_feed_forward_length(config.n_ff)
    writer.add_expert_count(config.n_expert)
    writer.add_expert_used_count(config.n_expert_used)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_key_length(config.n_embd // config.n_head)
    writer.add_value_length(config.n_embd // config.n_head)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_freq_base(config.rope_base)
    add_tokenizer(writer, args.data / "tokenizer.json")
    for name, data, kind in tensors(state, config):
        writer.add_tensor(name, quantize(np.ascontiguousarray(data, dtype=np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, step {checkpoint['step']}")


if __name__ == "__main__":
    main()
