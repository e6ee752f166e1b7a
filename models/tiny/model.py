# SPDX-License-Identifier: MIT
"""The tiny MoE language model in PyTorch, computing exactly what llama.cpp's `qwen3moe` graph computes.

Per layer: RMSNorm, grouped-query attention with RMSNorm on each query and key head and NEOX rotary
positions, RMSNorm, softmax router, the best `n_expert_used` probabilities renormalised to sum 1, SwiGLU
experts. There are no biases and no shared expert; the output matrix is tied to the token embedding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    """Shape, in llama.cpp's words. Matrix rows (n_embd, n_ff, heads) are multiples of a Q8_0 block of 32."""

    n_vocab: int = 4096
    n_ctx: int = 512
    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    n_expert: int = 32
    n_expert_used: int = 4
    n_ff: int = 128
    rope_base: float = 10000.0
    eps: float = 1e-6


class ExpertMLP(torch.autograd.Function):
    """SwiGLU of every (token, chosen expert) pair, one matrix product per expert on its tokens.

    Written by hand, since autograd would allocate a gradient of all experts for each expert used.
    `forward` takes x (T, d), order (T*k,) the pairs sorted by expert, counts (E,) pairs per expert, w_gate_up
    (E, 2f, d) and w_down (E, d, f); it returns (T, k, d).
    """

    @staticmethod
    def forward(ctx, x, order, counts, w_gate_up, w_down):
        k = order.numel() // x.shape[0]
        cuts = [0, *counts.cumsum(0).tolist()]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        xs = x[order // k]
        gate_up = x.new_empty(order.numel(), w_gate_up.shape[1])
        for e in range(len(cuts) - 1):
            a, b = cuts[e], cuts[e + 1]
            torch.mm(xs[a:b], w_gate_up[e].t(), out=gate_up[a:b])
        gate, up = gate_up.chunk(2, dim=1)
        h = F.silu(gate) * up
        y = torch.empty_like(xs)
        for e in range(len(cuts) - 1):
            a, b = cuts[e], cuts[e + 1]
            torch.mm(h[a:b], w_down[e].t(), out=y[a:b])
        ctx.save_for_backward(xs, gate_up, h, order, inverse, w_gate_up, w_down)
        ctx.cuts = cuts
        return y[inverse].view(x.shape[0], k, -1)

    @staticmethod
    def backward(ctx, grad):
        xs, gate_up, h, order, inverse, w_gate_up, w_down = ctx.saved_tensors
        cuts, k = ctx.cuts, grad.shape[1]
        dy = grad.reshape(order.numel(), -1)[order]
        dh, dw_down = torch.empty_like(h), torch.empty_like(w_down)
        for e in range(len(cuts) - 1):
            a, b = cuts[e], cuts[e + 1]
            torch.mm(dy[a:b], w_down[e], out=dh[a:b])
            torch.mm(dy[a:b].t(), h[a:b], out=dw_down[e])
        gate, up = gate_up.chunk(2, dim=1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        dgate_up = torch.cat((dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu), dim=1)
        dxs, dw_gate_up = torch.empty_like(xs), torch.empty_like(w_gate_up)
        for e in range(len(cuts) - 1):
            a, b = cuts[e], cuts[e + 1]
            torch.mm(dgate_up[a:b], w_gate_up[e], out=dxs[a:b])
            torch.mm(dgate_up[a:b].t(), xs[a:b], out=dw_gate_up[e])
        return dxs[inverse].view(-1, k, xs.shape[1]).sum(1), None, None, dw_gate_up, dw_down


def rope(x, cos, sin):
    """Rotate halves (NEOX order) of x (B, heads, T, head size)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        head = c.n_embd // c.n_head
        self.config = c
        self.attn_norm = nn.RMSNorm(c.n_embd, c.eps)
        self.attn_qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_head_kv) * head, bias=False)
        self.attn_q_norm = nn.RMSNorm(head, c.eps)
        self.attn_k_norm = nn.RMSNorm(head, c.eps)
        self.attn_output = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.ffn_norm = nn.RMSNorm(c.n_embd, c.eps)
        self.router = nn.Linear(c.n_embd, c.n_expert, bias=False)
        self.w_gate_up = nn.Parameter(torch.empty(c.n_expert, 2 * c.n_ff, c.n_embd))
        self.w_down = nn.Parameter(torch.empty(c.n_expert, c.n_embd, c.n_ff))

    def attention(self, x, cos, sin):
        c, (batch, time, _) = self.config, x.shape
        head = c.n_embd // c.n_head
        q, k, v = (
            self.attn_qkv(x)
            .view(batch, time, -1, head)
            .transpose(1, 2)
            .split((c.n_head, c.n_head_kv, c.n_head_kv), dim=1)
        )
        q, k = rope(self.attn_q_norm(q), cos, sin), rope(self.attn_k_norm(k), cos, sin)
        repeat = c.n_head // c.n_head_kv
        out = F.scaled_dot_product_attention(
            q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1), is_causal=True
        )
        return self.attn_output(out.transpose(1, 2).reshape(batch, time, -1))

    def forward(self, x, cos, sin):
        """Return the new hidden state, the chosen experts (B*T, k) and the balance loss (1.0 is even)."""
        c = self.config
        x = x + self.attention(self.attn_norm(x), cos, sin)
        flat = self.ffn_norm(x).reshape(-1, c.n_embd)
        probs = F.softmax(self.router(flat), dim=-1)
        weights, chosen = probs.topk(c.n_expert_used, dim=-1)
        order = torch.argsort(chosen.reshape(-1), stable=True)
        counts = torch.bincount(chosen.reshape(-1), minlength=c.n_expert)
        y = ExpertMLP.apply(flat, order, counts, self.w_gate_up, self.w_down)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.bmm(weights.unsqueeze(1), y).view_as(x)
        balance = c.n_expert * (probs.mean(0) * (counts / counts.sum())).sum()
        return x + out, chosen, balance


class TinyMoE(nn.Module):
    """The whole model; `forward` maps token ids (B, T) to logits (B, T, n_vocab)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.token_embd = nn.Embedding(c.n_vocab, c.n_embd)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.n_layer))
        self.output_norm = nn.RMSNorm(c.n_embd, c.eps)
        half = c.n_embd // c.n_head // 2
        freqs = c.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(c.n_ctx, dtype=torch.float64), freqs)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # Matrices that write to the residual stream start smaller, so that depth does not inflate it.
                last = name.endswith(("attn_output.weight", "w_down"))
                nn.init.normal_(p, std=p.shape[-1] ** -0.5 * ((2 * c.n_layer) ** -0.5 if last else 1.0))
        nn.init.normal_(self.token_embd.weight, std=0.05)

    def forward(self, ids):
        """Return (logits, chosen experts of each layer, mean balance loss)."""
        x = self.token_embd(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        chosen, balance = [], 0.0
        for layer in self.layers:
            x, layer_chosen, layer_balance = layer(x, cos, sin)
            chosen.append(layer_chosen)
            balance = balance + layer_balance / len(self.layers)
        return F.linear(self.output_norm(x), self.token_embd.weight), chosen, balance
