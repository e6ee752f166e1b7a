# SPDX-License-Identifier: MIT
"""What programs do with llama_cpp.Llama: each feature as a function, which returns all that the class gives.

    python tests/support/api_calls.py model.gguf folder out.pickle

As a script it runs all of them with stock's class and saves what they return. Imports nothing of this
package, so that the reference cannot be touched by it.
"""

import functools
import json
import pickle
import sys
from pathlib import Path
from unittest import mock

import huggingface_hub
import llama_cpp
import numpy as np
from llama_cpp import llama_chat_format, llama_speculative

# One thread, as in tracing.py.
OPTIONS = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "seed": 7, "verbose": False}
PROMPT = "In the beginning God created"
MESSAGES = [
    {"role": "system", "content": "Answer in a few words."},
    {"role": "user", "content": "What did the king say?"},
]
GREEDY = {"temperature": 0.0, "max_tokens": 24}
SAMPLED = {"temperature": 0.9, "top_k": 50, "max_tokens": 24, "seed": 3}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
            "required": ["place", "days"],
        },
    },
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"

CALLS = {}


def call(function):
    """Put a function into CALLS; it gets a function that makes a model with options of its own."""
    CALLS[function.__name__] = function
    return function


def steady(result):
    """A result without what differs from one call to the next: ids and times; arrays as lists."""
    if isinstance(result, dict):
        return {name: steady(value) for name, value in result.items() if name not in ("id", "created")}
    if isinstance(result, (list, tuple)):
        return [steady(each) for each in result]
    if hasattr(result, "model_dump"):  # an object of openai's
        return steady(result.model_dump())
    return result.tolist() if isinstance(result, np.ndarray) else result


def text(completion):
    return completion["choices"][0]["text"]


# ---- completions


@call
def completion(make):
    llama = make(logits_all=True)
    return [llama(PROMPT, logprobs=3, echo=True, **GREEDY), llama.create_completion(PROMPT, **SAMPLED)]


@call
def completion_stopped(make):
    llama = make()
    eos = llama_cpp.LogitsProcessorList([llama_cpp.MinTokensLogitsProcessor(8, llama.token_eos())])
    short = llama_cpp.StoppingCriteriaList([lambda tokens, logits: len(tokens) > 12])
    return [
        llama(PROMPT, stop=["the", "\n"], **GREEDY),
        llama(PROMPT, stopping_criteria=short, **GREEDY),
        llama(PROMPT, logits_processor=eos, **SAMPLED),
    ]


@call
def streaming(make):
    llama = make()
    chunks = list(llama.create_completion(PROMPT, stream=True, **SAMPLED))
    assert len(chunks) > 5
    return chunks


@call
def tokens_one_by_one(make):
    llama = make(logits_all=True)
    found = []
    for token in llama.generate(llama.tokenize(PROMPT.encode()), temp=0.7, top_p=0.9):
        found.append(token)
        if len(found) == 20:
            break
    return [found, llama.detokenize(found), llama.scores[: llama.n_tokens]]


@call
def logits_processors(make):
    llama = make()
    seen = []

    def no_the(input_ids, scores):
        seen.append(float(scores.max()))
        scores[llama.tokenize(b" the", add_bos=False)] = -np.inf
        return scores

    with_it, without = (
        llama(PROMPT, logits_processor=processors, **GREEDY)
        for processors in (None, llama_cpp.LogitsProcessorList([no_the]))
    )
    assert " the" in text(with_it) and " the" not in text(without)
    return [with_it, without, seen, llama(PROMPT, logit_bias={300: 5.0, 301: -100.0}, **SAMPLED)]


@call
def grammar(make):
    llama = make()
    digits = llama_cpp.LlamaGrammar.from_string('root ::= ("4" | "7") [0-9] [0-9]', verbose=False)
    found = llama(PROMPT, grammar=digits, **SAMPLED)
    assert text(found)[0] in "47" and text(found).isdigit() and len(text(found)) == 3
    return found


@call
def samplers(make):
    llama = make()
    kinds = (
        {"mirostat_mode": 1}, {"mirostat_mode": 2}, {"min_p": 0.2}, {"typical_p": 0.5},
        {"repeat_penalty": 1.3}, {"frequency_penalty": 0.5, "presence_penalty": 0.5},
    )  # fmt: skip
    return [llama(PROMPT, **SAMPLED, **kind) for kind in kinds]


@call
def infill(make):
    return make()(PROMPT, suffix=" and the earth.", **GREEDY)


# ---- chat


@call
def chat(make):
    llama = make(chat_format="chatml")
    streamed = list(llama.create_chat_completion(MESSAGES, stream=True, **SAMPLED))
    return [llama.create_chat_completion(MESSAGES, **GREEDY), streamed]


@call
def chat_formats(make):
    llama = make()
    found = {}
    for name in sorted(llama_chat_format.LlamaChatCompletionHandlerRegistry()._chat_handlers):
        llama.chat_format = name
        try:
            found[name] = llama.create_chat_completion(MESSAGES, max_tokens=4, temperature=0.0)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    # functionary-v1 and -v2 want the tokenizer of a model on the Hub, and say so.
    refused = sorted(name for name, answer in found.items() if isinstance(answer, str))
    assert len(found) > 20 and refused == ["functionary-v1", "functionary-v2"], refused
    return found


@call
def chat_handler(make):
    formatter = llama_chat_format.Jinja2ChatFormatter(template=TEMPLATE, eos_token="", bos_token="")
    llama = make(chat_handler=formatter.to_chat_handler())
    return llama.create_chat_completion(MESSAGES, **GREEDY)


@call
def function_calling(make):
    llama = make(chat_format="chatml-function-calling")
    choice = {"type": "function", "function": {"name": "get_weather"}}
    options = {"tools": [WEATHER], "tool_choice": choice, "temperature": 0.0, "max_tokens": 64}
    found = llama.create_chat_completion(MESSAGES, **options)
    arguments = json.loads(found["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    assert arguments["place"] in ("Paris", "Rome") and arguments["days"] in (1, 2, 3)
    return [found, list(llama.create_chat_completion(MESSAGES, stream=True, **options))]


@call
def json_answers(make):
    llama = make(chat_format="chatml")
    wanted = {"type": "json_object", "schema": WEATHER["function"]["parameters"]}
    found = llama.create_chat_completion(MESSAGES, response_format=wanted, **{**GREEDY, "max_tokens": 64})
    assert set(json.loads(found["choices"][0]["message"]["content"])) == {"place", "days"}
    return found


@call
def openai_v1(make):
    llama = make(chat_format="chatml")
    answer = llama.create_chat_completion_openai_v1(MESSAGES, **SAMPLED)
    assert type(answer).__module__.startswith("openai.")
    return [answer, list(llama.create_chat_completion_openai_v1(MESSAGES, stream=True, **SAMPLED))]


# ---- embeddings


@call
def embeddings(make):
    texts = ["In the beginning", "And the king said unto them", "."]
    found = []
    for pooling in (llama_cpp.LLAMA_POOLING_TYPE_NONE, llama_cpp.LLAMA_POOLING_TYPE_MEAN):
        llama = make(embedding=True, pooling_type=pooling)
        found += [llama.embed(texts, normalize=True), llama.embed(texts[0]), llama.create_embedding(texts)]
    assert len(found[3]) == 3 and len(found[3][0]) == llama.n_embd() and np.std(found[3]) > 0
    return found


# ---- states and caches


@call
def saved_state(make):
    llama = make(logits_all=True)
    llama.eval(llama.tokenize(PROMPT.encode()))
    state = llama.save_state()
    first = llama(PROMPT, **SAMPLED)
    llama.reset()
    llama.eval([5, 6, 7])
    llama.load_state(state)
    again = llama(PROMPT, **SAMPLED)
    assert text(first) == text(again)
    return [first, again, state.llama_state, state.input_ids[: state.n_tokens], state.scores]


@call
def state_in_another_object(make):
    first, second = make(), make()
    first.eval(first.tokenize(PROMPT.encode()))
    second.load_state(first.save_state())
    first.eval([300])
    second.eval([300])
    assert first.save_state().llama_state == second.save_state().llama_state
    return second(PROMPT, **GREEDY)


@call
def caches(make, folder):
    found = []
    for cache in (llama_cpp.LlamaRAMCache(), llama_cpp.LlamaDiskCache(cache_dir=str(folder / "cache"))):
        llama = make()
        llama.set_cache(cache)
        found += [llama(PROMPT, **GREEDY), llama(PROMPT + " the", **GREEDY), llama(PROMPT, **GREEDY)]
        assert cache.cache_size > 0
    return found


# ---- speculative decoding


@call
def draft_model(make):
    calls = []

    class Draft(llama_speculative.LlamaPromptLookupDecoding):
        def __call__(self, input_ids, /, **kwargs):
            calls.append(super().__call__(input_ids, **kwargs).tolist())
            return np.array(calls[-1], np.intc)

    llama = make(draft_model=Draft(num_pred_tokens=6))
    prompt = "the king of the land and the king of the"
    found = [llama(prompt, **GREEDY), llama(prompt, **SAMPLED)]
    assert any(calls), "some tokens were drafted"
    return [*found, calls]


# ---- loading


@call
def pretrained(make, folder):
    """from_pretrained() with a Hub that has one repository, on this disk."""
    asked = []

    class FileSystem:
        def ls(self, repo_id, recursive):
            return [{"name": f"{repo_id}/{name}"} for name in ("README.md", "sub/tiny-Q8_0.gguf")]

    def download(**asked_for):
        asked.append({name: asked_for[name] for name in ("repo_id", "filename", "subfolder")})
        return str(make.model)

    patched = mock.patch.multiple(huggingface_hub, HfFileSystem=FileSystem, hf_hub_download=download)
    with patched:
        llama = make.kind.from_pretrained("someone/tiny-GGUF", "*Q8_0.gguf", cache_dir=folder, **make.options)
    assert type(llama) is make.kind
    make.made.append(llama)
    return [asked, llama(PROMPT, **GREEDY)]


@call
def pickled(make):
    llama = make(n_batch=64, logits_all=True)
    make.made.append(pickle.loads(pickle.dumps(llama)))
    return [each(PROMPT, **SAMPLED) for each in make.made]


class Make:
    """Makes models of one class for a call, and closes them."""

    def __init__(self, kind, model, **options):
        self.kind, self.model = kind, model
        self.options = {**OPTIONS, **options}
        self.made = []

    def __call__(self, **options):
        self.made.append(self.kind(str(self.model), **{**self.options, **options}))
        return self.made[-1]

    def run(self, name, folder):
        """What a call returns, made steady."""
        function = CALLS[name]
        if "folder" in function.__code__.co_varnames[: function.__code__.co_argcount]:
            function = functools.partial(function, folder=folder)
        try:
            return steady(function(self))
        finally:
            for llama in self.made:
                llama.close()


def main(model, folder, out):
    """Run everything with stock and save."""
    found = {name: Make(llama_cpp.Llama, model).run(name, Path(folder)) for name in CALLS}
    Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
