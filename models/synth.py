# SPDX-License-Identifier: MIT
"""Write synthetic MoE models: valid GGUF of real shapes with random weights and routing of chosen locality.

For tests and benchmarks of expert paging, where only shapes, bytes and routing matter; the text such a model
generates means nothing. Blocks are written directly (blocks.py), in constant memory, at about disk speed.

    python -m models.synth out.gguf --shape qwen3-30b-a3b --type q4_k_m --locality 0.38
    python -m models.synth out.gguf --shape test --layers 8 --experts 32 --type q8_0 --shards 3
"""

import os
import time
from dataclasses import replace
from pathlib import Path

import click
from gguf import GGUFWriter, TokenType

from models.locality import strength_for
from models.plan import DIMENSIONS, MODEL_TYPES, SHAPES, Plan, check

ALIGNMENT = 32  # of tensor data: the format's default, which GGUFWriter assumes too


def byte_letters():
    """The 256 printable stand-ins of byte-level BPE, as GPT-2 orders them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def add_metadata(writer, shape, name):
    """Hyperparameters and a byte-level vocabulary with letter-pair merges; token 0 is BOS and EOS."""
    s = shape
    writer.add_name(name)
    writer.add_quantization_version(2)
    writer.add_vocab_size(s.vocab)
    writer.add_context_length(s.ctx)
    writer.add_embedding_length(s.embd)
    writer.add_block_count(s.layers)
    writer.add_feed_forward_length(s.ff)
    if s.arch != "llama":
        writer.add_expert_feed_forward_length(s.ff)
    writer.add_expert_count(s.experts)
    writer.add_expert_used_count(s.used)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.heads_kv)
    writer.add_key_length(s.head_dim)
    writer.add_value_length(s.head_dim)
    writer.add_rope_dimension_count(s.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(s.freq_base)
    if s.arch == "gpt-oss":
        writer.add_sliding_window(128)
    if s.arch == "hy_v3":
        writer.add_expert_shared_feed_forward_length(s.ff)
        writer.add_expert_weights_norm(True)
    letters = "etaoinsrhldcumfpgwybvkxjqz"
    pairs = [a + " " + b for a in "Ġ" + letters for b in letters][: s.vocab - 257]
    tokens = ["<|endoftext|>", *byte_letters(), *(p.replace(" ", "") for p in pairs)]
    tokens += [f"[{i}]" for i in range(len(tokens), s.vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (s.vocab - 1))
    writer.add_token_merges(pairs)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def split_evenly(tensors, shards):
    """Cut the list of tensors into `shards` non-empty runs of about equal bytes."""
    if not 1 <= shards <= len(tensors):
        raise ValueError(
            f"shards: {shards} asked, the model has {len(tensors)} tensors; choose 1 to that many."
        )
    total, done, parts = sum(t.n_bytes for t in tensors), 0, [[] for _ in range(shards)]
    for i, tensor in enumerate(tensors):
        wanted = int((done + tensor.n_bytes / 2) * shards / total)
        # No shard may stay empty: keep one tensor for each shard still to come.
        used = max(n for n, part in enumerate(parts) if part or n == 0)
        latest = used + 1 if parts[used] else used
        part = min(max(wanted, shards - (len(tensors) - i)), latest, shards - 1)
        parts[part].append(tensor)
        done += tensor.n_bytes
    return parts


def shard_paths(path, shards):
    """Files of a model in `shards` parts, named as llama.cpp expects them; one part keeps `path` itself."""
    if shards == 1:
        return [path]
    prefix = path.name.removesuffix(".gguf")
    return [path.with_name(f"{prefix}-{i + 1:05d}-of-{shards:05d}.gguf") for i in range(shards)]


def write_file(path, shape, tensors, number, count, total, name):
    """Write one shard (or the only file) under a temporary name, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    writer = GGUFWriter(temporary, shape.arch)
    if number == 0:
        add_metadata(writer, shape, name)
    if count > 1:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", total)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, "float32", tensor.n_bytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    # GGUFWriter wants each tensor whole in memory, so that data is appended without it.
    with open(temporary, "ab", buffering=2**20) as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            start = file.tell()
            tensor.write(file)
            if file.tell() - start != tensor.n_bytes:
                raise AssertionError(
                    f"{tensor.name}: {file.tell() - start} bytes, {tensor.n_bytes} announced"
                )
        file.write(bytes(-file.tell() % ALIGNMENT))
    os.replace(temporary, path)


def synthesize(path, shape="test", *, type="q4_0", seed=0, locality=None, shards=1, **overrides):
    """Write a synthetic MoE model as GGUF.

    Parameters
    ----------
    path : path-like
        File to write. With several shards its name without ``.gguf`` is the prefix of
        ``-00001-of-0000N.gguf`` and so on.
    shape : str
        A name in `models.plan.SHAPES`.
    type : str
        Type of the expert matrices, one of `models.plan.MODEL_TYPES`; the other matrices are Q8_0, or the
        same type where that is a float.
    seed : int
        The same arguments and seed give the same bytes.
    locality : float or None
        Wanted mean share of a token's experts that the previous token used too (0.38 was measured on
        Qwen3-30B-A3B); with None or 0 the token alone decides, which gives about n_used / n_expert.
    shards : int
        Number of files.
    **overrides
        Dimensions to change, of `models.plan.DIMENSIONS`.

    Returns
    -------
    pathlib.Path
        The file to load: `path`, or the first shard.

    Raises
    ------
    ValueError
        If the shape, type, locality or number of shards is impossible; the message says which and why.
    """
    path = Path(path)
    if shape not in SHAPES:
        raise ValueError(
            f"shape: no {shape!r}; known are {', '.join(SHAPES)}; choose one and override dimensions."
        )
    unknown = set(overrides) - set(DIMENSIONS)
    if unknown:
        raise ValueError(
            f"{shape}: cannot override {', '.join(sorted(unknown))}; dimensions are {', '.join(DIMENSIONS)}; "
            "choose among these."
        )
    final = replace(SHAPES[shape], **overrides)
    check(final, type)
    strength = (
        strength_for(locality, final.experts, final.used, final.head_dim, final.freq_base)
        if locality
        else 0.0
    )
    plan = Plan(final, type, seed, strength)
    parts = split_evenly(plan.tensors, shards)
    plan.fill_pools()
    paths = shard_paths(path, shards)
    for number, (file, tensors) in enumerate(zip(paths, parts, strict=True)):
        write_file(file, final, tensors, number, shards, len(plan.tensors), f"synthetic {shape} {type}")
    return paths[0]


def parse_locality(_context, _parameter, value):
    """Click callback: a share, or none."""
    if value == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no share; give 0.38, say, or none.") from None


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="test", show_default=True)
@click.option(
    "--type",
    "kind",
    type=click.Choice(MODEL_TYPES),
    default="q4_0",
    show_default=True,
    help="Type of the expert matrices.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--locality",
    default="none",
    show_default=True,
    callback=parse_locality,
    help="Share of the experts used again by the next token, 0.38 for Qwen3-30B; none: random-like.",
)
@click.option("--shards", default=1, show_default=True, help="Write a split GGUF of this many files.")
@click.option("--layers", type=int, help="Override; so are all below.")
@click.option("--embd", type=int)
@click.option("--heads", type=int)
@click.option("--heads-kv", type=int)
@click.option("--head-dim", type=int)
@click.option("--ff", type=int, help="Width of one expert.")
@click.option("--experts", type=int)
@click.option("--used", type=int)
@click.option("--vocab", type=int)
@click.option("--ctx", type=int)
@click.option("--freq-base", type=float)
@click.option(
    "--fused-gate-up", "fused", is_flag=True, default=None, help="One tensor for both; test-shared only."
)
def main(path, shape, kind, seed, locality, shards, **overrides):
    """Write a synthetic MoE model to PATH."""
    begin = time.monotonic()
    overrides = {name: value for name, value in overrides.items() if value is not None}
    try:
        first = synthesize(path, shape, type=kind, seed=seed, locality=locality, shards=shards, **overrides)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    n_bytes = sum(p.stat().st_size for p in shard_paths(path, shards))
    seconds = time.monotonic() - begin
    click.echo(
        f"{first}: {n_bytes / 2**20:.0f} MiB in {seconds:.1f} s, {n_bytes / 2**20 / seconds:.0f} MiB/s"
    )


if __name__ == "__main__":
    main()
