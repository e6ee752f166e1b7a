# SPDX-License-Identifier: MIT
"""All logits of a prompt and of a greedy continuation; as a script, those of stock llama_cpp.

    python tests/support/tracing.py model.gguf out.npz '{"n_prompt": 100, "use_extra_bufts": false}'

Does not import rotary_llamacpp, which therefore cannot affect the reference.
"""

import json
import sys

import llama_cpp
import llama_cpp.llama_cpp as llama_api
import numpy as np

# One thread, as several spin at ggml's barriers, which takes minutes on a busy machine.
OPTIONS = {
    "n_ctx": 256,
    "n_threads": 1,
    "n_threads_batch": 1,
    "logits_all": True,
    "verbose": False,
    "seed": 1,
}


def prompt_tokens(n_vocab, n_prompt):
    """Fixed tokens, spread over the vocabulary so that they use many experts."""
    return [int(token) for token in np.random.default_rng(n_prompt).integers(3, n_vocab, n_prompt)]


def trace(llama, n_prompt, n_decode=12):
    """Logits of every position, shape (n_prompt + n_decode, n_vocab), and the greedy tokens."""
    llama.reset()
    llama.eval(prompt_tokens(llama.n_vocab(), n_prompt))
    greedy = []
    for _ in range(n_decode):
        greedy.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval([greedy[-1]])
    return {"logits": llama.scores[: llama.n_tokens].copy(), "greedy": np.array(greedy)}


def main(model, out, options):
    """Trace stock and save the result."""
    options = dict(options)
    lengths = {name: options.pop(name) for name in ("n_prompt", "n_decode") if name in options}
    use_extra_bufts = options.pop("use_extra_bufts", True)
    stock_params = llama_api.llama_model_default_params

    def params():
        made = stock_params()
        made.use_extra_bufts = use_extra_bufts
        return made

    llama_api.llama_model_default_params = params
    np.savez(out, **trace(llama_cpp.Llama(model, **{**OPTIONS, **options}), **lengths))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
