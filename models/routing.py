# SPDX-License-Identifier: MIT
"""Record which experts stock llama.cpp routes to, and summarise such a trace.

Recording uses the `cb_eval` callback of llama_context_params: llama.cpp asks about every graph node whether
its data is wanted (`ask`), and if so calls again with the data. CPU only: data is read where the tensor lies.

    python -m models.routing models/tiny-moe-q8_0.gguf --tokens 256
    python -m models.routing some.route.csv
"""

import ctypes
from collections import OrderedDict
from pathlib import Path

import click
import numpy as np


class _Tensor(ctypes.Structure):
    """struct ggml_tensor up to its name (ggml.h of the llama.cpp in llama-cpp-python 0.3.36)."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def observer(ll, seen):
    """A `cb_eval` callback that writes the last token's experts of each layer to the dict `seen`.

    `ll` is the module llama_cpp. Keep a reference to the callback while the context lives.
    """

    @ll.ggml_backend_sched_eval_callback
    def observe(pointer, ask, _):
        tensor = ctypes.cast(pointer, ctypes.POINTER(_Tensor)).contents
        if not tensor.name.startswith(b"ffn_moe_topk-"):
            return not ask  # if asked: not wanted; if shown its data: go on
        if not ask:
            last = tensor.data + (tensor.ne[1] - 1) * tensor.nb[1]
            seen[int(tensor.name[13:])] = list((ctypes.c_int32 * tensor.ne[0]).from_address(last))
        return True

    return observe


def record(
    path, n_tokens, prompt="In the beginning", seed=0, temperature=1.0, random_tokens=False, n_threads=2
):
    """Decode `n_tokens` tokens one by one with stock llama.cpp and return the experts each layer chose.

    Parameters
    ----------
    path : path-like
        GGUF file (the first shard of a split one).
    temperature : float
        Temperature at which tokens are sampled from the logits, unless `random_tokens` are decoded.

    Returns
    -------
    numpy.ndarray
        (n_tokens, layers, n_expert_used) int32.
    """
    import llama_cpp as ll
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    seen = {}

    observe = observer(ll, seen)
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
    if not model:
        raise RuntimeError(
            f"{path}: llama.cpp could not load it; llama_cpp.Llama(path, verbose=True) logs why."
        )
    vocab = ll.llama_model_get_vocab(model)
    n_vocab = ll.llama_vocab_n_tokens(vocab)
    params = ll.llama_context_default_params()
    params.n_ctx = n_tokens + 256
    params.n_threads = params.n_threads_batch = n_threads
    params.cb_eval = observe
    context = ll.llama_init_from_model(model, params)
    try:
        text = prompt.encode()
        ids = (ll.llama_token * 256)()
        n = ll.llama_tokenize(vocab, text, len(text), ids, 256, True, False)
        if not context or n <= 0:
            raise RuntimeError(f"{path}: no context, or a prompt of {n} tokens; 1 to 256 fit; shorten it.")
        rng = np.random.default_rng(seed)
        trace = []
        for _ in range(n_tokens + 1):
            status = ll.llama_decode(context, ll.llama_batch_get_one(ids, n))
            if status:
                raise RuntimeError(f"{path}: llama_decode returned {status} at token {len(trace)}.")
            trace.append([seen[il] for il in sorted(seen)])
            if random_tokens:
                ids[0] = int(rng.integers(1, n_vocab))
            else:
                logits = np.ctypeslib.as_array(ll.llama_get_logits_ith(context, -1), (n_vocab,))
                noise = temperature * rng.gumbel(size=n_vocab) if temperature else 0.0
                ids[0] = int(np.argmax(logits + noise))
            n = 1
        return np.array(trace[1:], dtype=np.int32)  # the first is the prompt's last token
    finally:
        if context:
            ll.llama_free(context)
        ll.llama_model_free(model)


def read_csv(path):
    """Read the decode phase of a `route_trace v1` CSV; returns a trace like `record`'s, and n_expert."""
    n_expert, tokens = None, {}
    with open(path) as file:
        for line in file:
            if line.startswith("#"):
                if "n_expert=" in line:
                    n_expert = int(line.split("n_expert=")[1].split()[0])
                continue
            field = line.split(",")
            if field[1] == "1":
                tokens.setdefault((int(field[0]), int(field[2])), {}).setdefault(int(field[3]), []).append(
                    int(field[5])
                )
    return np.array([[layers[il] for il in sorted(layers)] for _, layers in sorted(tokens.items())]), n_expert


def overlap(trace, lag=1):
    """Mean over tokens and layers of |S_t & S_(t-lag)| / n_used; None if the trace is not longer than lag."""
    if len(trace) <= lag:
        return None
    return float(
        (trace[lag:, :, :, None] == trace[:-lag, :, None, :]).sum(axis=(2, 3)).mean() / trace.shape[2]
    )


def lru_hit_rate(trace, capacity):
    """Share of expert requests found by an LRU cache of `capacity` experts per layer that starts empty."""
    hits = 0
    for il in range(trace.shape[1]):
        cache = OrderedDict()
        for experts in trace[:, il].tolist():
            for expert in sorted(experts):
                if expert in cache:
                    hits += 1
                    cache.move_to_end(expert)
                else:
                    cache[expert] = None
                    if len(cache) > capacity:
                        cache.popitem(last=False)
    return hits / trace.size if trace.size else None


def usage_entropy(trace, n_expert):
    """Mean over layers of the entropy of expert use; 1.0 if all experts are used equally."""
    entropies = []
    for il in range(trace.shape[1]):
        p = np.bincount(trace[:, il].ravel(), minlength=n_expert) / trace[:, il].size
        entropies.append(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(n_expert))
    return float(np.mean(entropies))


def summary(trace, n_expert):
    """Lines of text: overlap by lag, LRU hit rates at 12.5, 25 and 50 % residency, entropy of use."""
    n_tokens, n_layer, n_used = trace.shape
    lags = [lag for lag in (1, 2, 3, 4, 6, 8, 12, 16) if lag < n_tokens]
    per_layer = [f"{100 * overlap(trace[:, [il]]):.0f}" for il in range(n_layer)]
    rates = [
        f"{100 * share:g} %: {100 * lru_hit_rate(trace, int(n_expert * share)):.1f}"
        for share in (0.125, 0.25, 0.5)
    ]
    return "\n".join(
        (
            f"{n_tokens} tokens, {n_layer} layers, {n_used} of {n_expert} experts "
            f"(chance {100 * n_used / n_expert:.1f} %)",
            "overlap by lag, %: " + ", ".join(f"{lag}: {100 * overlap(trace, lag):.1f}" for lag in lags),
            "lag-1 overlap by layer, %: " + " ".join(per_layer),
            "LRU hit rate per layer by residency, %: " + ", ".join(rates),
            f"entropy of use: {usage_entropy(trace, n_expert):.3f} of the even use's",
        )
    )


def expert_count(path):
    """n_expert of a GGUF file, from its metadata."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return int(next(f for name, f in fields.items() if name.endswith(".expert_count")).contents())


@click.command()
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tokens", default=128, show_default=True, help="Tokens to decode.")
@click.option("--prompt", default="In the beginning", show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option(
    "--random", "random_tokens", is_flag=True, help="Decode uniformly random tokens, not the model's own."
)
@click.option("--seed", default=0, show_default=True)
def main(path, tokens, prompt, temperature, random_tokens, seed):
    """Summarise the routing of the GGUF model or the route_trace CSV at PATH."""
    if path.suffix == ".csv":
        trace, n_expert = read_csv(path)
    else:
        n_expert = expert_count(path)
        trace = record(path, tokens, prompt, seed, temperature, random_tokens)
    click.echo(summary(trace, n_expert))


if __name__ == "__main__":
    main()
