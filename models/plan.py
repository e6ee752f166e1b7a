# SPDX-License-Identifier: MIT
"""Plan of a synthetic MoE model: its shape, its tensors, and for each tensor a function that writes the data.

Files and the command line are in synth.py.

All scales below rest on the layout of the hidden state (`Axes`): 32 *static* dimensions, which every token
embedding fills with the same constant; *token* dimensions, random per token, to which layer 0's attention
adds a memory of the last tokens; and *free* dimensions, to which experts and the other layers write.
Routers read static and token dimensions, so that embeddings and layer 0 alone decide the routing at any
depth (see locality.py). The output matrix reads token and free dimensions, so that a wrong expert changes
the logits but hardly the routing.
"""

from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Q
from gguf.quants import quantize

from models.blocks import PAYLOAD_RMS, TYPES, Pool, dense, payload
from models.locality import KERNEL_GAIN, MEMORY, STATIC
from rotary_llamacpp.planning import shapes

LEAK = 0.02  # share of the experts' and later attention's output that reaches token dimensions
ROUTER_GAIN = 2.0  # spread of router logits: the chosen experts' weights then differ as in real models
LOGIT_STD = 2.0


@dataclass(frozen=True)
class Shape(shapes.Shape):
    """A shape of the package with what only a file needs; only DIMENSIONS and `arch` determine the model."""

    freq_base: float = 1e6  # base of the rotary frequencies
    fused: bool = False  # gate and up in one tensor; only hy_v3 of these architectures loads it
    routers: str = "f32"  # type of the routers; some models have others


_FREQ_BASE = {"llama": 1e6, "qwen3moe": 1e6, "gpt-oss": 150000.0}
SHAPES = {
    **{
        name: Shape(**vars(known), freq_base=_FREQ_BASE[known.arch])
        for name, known in shapes.SHAPES.items()
        if known.arch in _FREQ_BASE
    },
    "test": Shape("qwen3moe", 4, 256, 4, 2, 64, 256, 16, 4, 512, 4096),
    "test-llama": Shape("llama", 4, 256, 4, 2, 64, 256, 8, 2, 512, 4096),
    "test-gpt-oss": Shape("gpt-oss", 4, 256, 4, 2, 64, 256, 16, 4, 512, 4096, freq_base=150000.0),
    "test-shared": Shape("hy_v3", 4, 256, 4, 2, 64, 256, 16, 4, 512, 4096),
}
DIMENSIONS = (
    "layers", "embd", "heads", "heads_kv", "head_dim", "ff", "experts", "used", "vocab", "ctx", "freq_base",
    "fused", "routers",
)  # fmt: skip
MODEL_TYPES = (*TYPES, "q4_k_m")  # q4_k_m: q4_k, and q6_k for every other layer's down experts


class Axes:
    """Positions of the static, token and free dimensions, and column scales by them."""

    def __init__(self, embd):
        self.groups = embd // 32
        self.token = (self.groups - 1) // 2  # groups of 32 columns: 1 static, then token, then free
        self.n_token = 32 * self.token
        self.n_free = embd - 32 - self.n_token

    def columns(self, static, token, free):
        """Scale of each group of 32 columns for integers of `payload`, from wanted standard deviations."""
        return np.repeat((static, token, free), (1, self.token, self.groups - 1 - self.token)) / PAYLOAD_RMS


@dataclass
class Tensor:
    """Name, GGUF shape (slowest first), type, and the function that writes the data to an open file."""

    name: str
    shape: tuple
    kind: Q
    write: object

    @property
    def n_bytes(self):
        size, n_bytes = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // size * n_bytes


class Plan:
    """All tensors of one model in file order.

    Each tensor draws from a generator seeded by (seed, its number), so that data do not depend on sharding.
    """

    def __init__(self, shape, kind_name, seed, strength):
        self.shape, self.seed, self.strength = shape, seed, strength
        self.axes = Axes(shape.embd)
        self.kind_name = kind_name
        kind = TYPES["q4_k" if kind_name == "q4_k_m" else kind_name]
        self.dense_kind = kind if kind in (Q.F32, Q.F16, Q.BF16) else Q.Q8_0
        self.signs = np.random.default_rng((seed, 1)).choice((-100, 100), 32).astype(np.int8)
        self.kind = kind
        self.pools = {}
        self.matrices = {}  # number of planned matrices, by pool
        self.tensors = []
        self._build()

    # planning

    def _add(self, name, tensor_shape, kind, write):
        self.tensors.append(Tensor(name, tensor_shape, kind, write))

    def _rng(self):
        return np.random.default_rng((self.seed, 2, len(self.tensors)))

    def _vector(self, name, *dims, value=1.0, std=0.0):
        data = (value + std * self._rng().standard_normal(dims)).astype("<f4")
        self._add(name, dims, Q.F32, lambda file: file.write(data.tobytes()))

    def _dense(self, name, rows, cols, segments):
        """Add a dense matrix of (rows, column scales) segments of random integers."""
        rng = self._rng()

        def write(file):
            for n_rows, scale in segments:
                for n in chunks(n_rows, cols):
                    file.write(dense(self.dense_kind, payload(rng, n, cols), scale).tobytes())

        self._add(name, (rows, cols), self.dense_kind, write)

    def _experts(self, name, rows, cols, segments, kind=None):
        """Add expert matrices, each of (rows, standard deviation) segments copied from the pools."""
        kind = kind or self.kind
        plan = []
        for n_rows, std in segments:
            key = (kind, std)
            first = self.matrices.setdefault(key, 0)
            self.matrices[key] += self.shape.experts
            plan.append((key, first, n_rows * cols))

        def write(file):
            for expert in range(self.shape.experts):
                for key, first, n_values in plan:
                    self.pools[key].write(file, n_values, first + expert)

        self._add(name, (self.shape.experts, rows, cols), kind, write)

    def fill_pools(self):
        """Make the pools once all matrices are counted; larger models get larger pools."""
        target = 2**25 if sum(t.n_bytes for t in self.tensors) > 2**28 else 2**21
        for number, ((kind, std), matrices) in enumerate(self.matrices.items()):
            n_blocks = max(target // GGML_QUANT_SIZES[kind][1], 2 * matrices)
            self.pools[kind, std] = Pool(kind, std, 2 ** int(n_blocks).bit_length(), (self.seed, 3, number))

    # the model

    def _build(self):
        s, axes = self.shape, self.axes
        rng = self._rng()

        def embedding(file):
            for n in chunks(s.vocab, s.embd):
                values = payload(rng, n, s.embd).copy()
                values[:, :32] = self.signs
                scale = axes.columns(PAYLOAD_RMS / 100, 1.0, 1.0)
                file.write(dense(self.dense_kind, values, scale).tobytes())

        self._add("token_embd.weight", (s.vocab, s.embd), self.dense_kind, embedding)
        for il in range(s.layers):
            self._attention(il, f"blk.{il}.")
            self._moe(il, f"blk.{il}.")
        self._vector("output_norm.weight", s.embd)
        self._output()

    def _output(self):
        """Add the output matrix. Row 0 (end of text) reads the constant, for a logit of about -10."""
        s, axes = self.shape, self.axes
        rng = self._rng()

        def write(file):
            std = LOGIT_STD / (axes.n_token + axes.n_free) ** 0.5
            first = np.zeros((1, s.embd), dtype=np.int8)
            first[0, :32] = -self.signs
            file.write(
                dense(self.dense_kind, first, axes.columns(PAYLOAD_RMS * 30 / 32 / 100, 0, 0)).tobytes()
            )
            for n in chunks(s.vocab - 1, s.embd):
                file.write(
                    dense(self.dense_kind, payload(rng, n, s.embd), axes.columns(0, std, std)).tobytes()
                )

        self._add("output.weight", (s.vocab, s.embd), self.dense_kind, write)

    def _attention(self, il, blk):
        """Add the attention of a layer.

        Scores depend on distance only: queries equal keys and read the constant. Values read the token
        dimensions; layer 0 writes them back there as memory, later layers write to the free dimensions.
        """
        s, axes = self.shape, self.axes
        # A token's attention score with itself is KERNEL_GAIN, set by the norms if any, else by scale.
        key_std = (KERNEL_GAIN / s.head_dim**0.5) ** 0.5
        normed = s.arch in ("qwen3moe", "hy_v3")
        self._vector(blk + "attn_norm.weight", s.embd)
        state = (self.seed, 4, il)
        group = s.heads // s.heads_kv
        columns = axes.columns(PAYLOAD_RMS / 100 * key_std / 32, 0, 0)

        def keys(file, repeat):
            key_rng = np.random.default_rng(state)
            for _ in range(s.heads_kv):
                # Each component is +-key_std, so that all rotary frequencies have the same weight, as
                # attention_kernel assumes.
                values = payload(key_rng, s.head_dim, s.embd).copy()
                values[:, :32] = self.signs * key_rng.choice((-1, 1), (s.head_dim, 1))
                head = dense(self.dense_kind, values, columns).tobytes()
                for _ in range(repeat):
                    file.write(head)

        self._add(
            blk + "attn_q.weight",
            (s.heads * s.head_dim, s.embd),
            self.dense_kind,
            lambda file: keys(file, group),
        )
        self._add(
            blk + "attn_k.weight",
            (s.heads_kv * s.head_dim, s.embd),
            self.dense_kind,
            lambda file: keys(file, 1),
        )
        self._dense(
            blk + "attn_v.weight",
            s.heads_kv * s.head_dim,
            s.embd,
            [(s.heads_kv * s.head_dim, axes.columns(0, axes.n_token**-0.5, 0))],
        )
        if normed:
            self._vector(blk + "attn_q_norm.weight", s.head_dim, value=key_std)
            self._vector(blk + "attn_k_norm.weight", s.head_dim, value=key_std)
        cols = s.heads * s.head_dim
        unit = np.full(cols // 32, 1.0 / PAYLOAD_RMS / cols**0.5)
        memory = self.strength * MEMORY if il == 0 else LEAK / s.layers**0.5
        self._dense(
            blk + "attn_output.weight",
            s.embd,
            cols,
            [(32, 0 * unit), (axes.n_token, memory * unit), (axes.n_free, unit * s.layers**-0.5)],
        )
        if s.arch == "gpt-oss":
            for name, n in (
                ("q", s.heads * s.head_dim),
                ("k", s.heads_kv * s.head_dim),
                ("v", s.heads_kv * s.head_dim),
                ("output", s.embd),
            ):
                self._vector(f"{blk}attn_{name}.bias", n, value=0.0)
            self._vector(blk + "attn_sinks.weight", s.heads, value=-5.0)

    def _moe(self, il, blk):
        s, axes = self.shape, self.axes
        rng = self._rng()
        self._vector(
            blk + ("post_attention_norm.weight" if s.arch == "gpt-oss" else "ffn_norm.weight"), s.embd
        )
        router = np.zeros((s.experts, s.embd), dtype="<f4")
        router[:, :32] = (
            self.strength * STATIC / 32 * rng.standard_normal((s.experts, 1)) * np.sign(self.signs)
        )
        router[:, 32 : 32 + axes.n_token] = (
            rng.standard_normal((s.experts, axes.n_token)) * axes.n_token**-0.5
        )
        router *= ROUTER_GAIN
        kind = Q[s.routers.upper()]
        data = quantize(router, kind).tobytes()
        self._add(blk + "ffn_gate_inp.weight", router.shape, kind, lambda file: file.write(data))
        inward = s.embd**-0.5
        # silu(gate) * up of unit normals has a standard deviation of 0.6; k experts of weight about 1/k add
        # up to 1/sqrt(k). All layers together then give the free dimensions twice what the embedding gives.
        outward = 2.0 / (0.6 * s.ff**0.5) * (s.used / s.layers) ** 0.5
        out = [(32 + axes.n_token, LEAK * outward), (axes.n_free, outward)]
        if s.fused:
            self._experts(blk + "ffn_gate_up_exps.weight", 2 * s.ff, s.embd, [(2 * s.ff, inward)])
        else:
            self._experts(blk + "ffn_gate_exps.weight", s.ff, s.embd, [(s.ff, inward)])
            self._experts(blk + "ffn_up_exps.weight", s.ff, s.embd, [(s.ff, inward)])
        wide = Q.Q6_K if self.kind_name == "q4_k_m" and il % 2 == 0 else None
        self._experts(blk + "ffn_down_exps.weight", s.embd, s.ff, out, wide)
        if s.arch == "gpt-oss":
            self._vector(blk + "ffn_gate_inp.bias", s.experts, value=0.0)
            for name, n in (("gate", s.ff), ("up", s.ff)):
                self._vector(f"{blk}ffn_{name}_exps.bias", s.experts, n, value=0.0, std=0.1)
            self._vector(blk + "ffn_down_exps.bias", s.experts, s.embd, value=0.0, std=0.001)
        if s.arch == "hy_v3":
            self._dense(blk + "ffn_gate_shexp.weight", s.ff, s.embd, [(s.ff, axes.columns(*3 * [inward]))])
            self._dense(blk + "ffn_up_shexp.weight", s.ff, s.embd, [(s.ff, axes.columns(*3 * [inward]))])
            unit = np.full(s.ff // 32, 1.0 / PAYLOAD_RMS)
            self._dense(blk + "ffn_down_shexp.weight", s.embd, s.ff, [(n, unit * std) for n, std in out])


def chunks(rows, cols, values=2**23):
    """Row counts that add up to `rows`, each of at most `values` values."""
    step = max(1, values // cols)
    return [min(step, rows - at) for at in range(0, rows, step)]


def check(shape, kind_name):
    """Raise ValueError if llama.cpp would not load the shape, or blocks do not fit into its rows."""

    def refuse(what, limit, remedy):
        raise ValueError(f"{shape.arch} shape: {what}; {limit}; {remedy}.")

    if kind_name not in MODEL_TYPES:
        refuse(f"type {kind_name}", f"known are {', '.join(MODEL_TYPES)}", "choose one")
    if shape.embd < 96 or any(n % 32 for n in (shape.embd, shape.ff, shape.head_dim)):
        refuse(
            f"embd {shape.embd}, ff {shape.ff}, head_dim {shape.head_dim}",
            "multiples of 32 are needed, embd of at least 96",
            "round them",
        )
    kind = TYPES["q4_k" if kind_name == "q4_k_m" else kind_name]
    block = GGML_QUANT_SIZES[kind][0]
    if shape.embd % block or shape.ff % block:
        refuse(
            f"embd {shape.embd} and ff {shape.ff} in {kind_name}",
            f"rows are blocks of {block}",
            "round them or choose a type with blocks of 32",
        )
    if not 0 < shape.used <= shape.experts:
        refuse(f"{shape.used} of {shape.experts} experts used", "1 to all can be used", "lower used")
    if shape.heads % shape.heads_kv:
        refuse(
            f"{shape.heads} heads for {shape.heads_kv} KV heads", "a multiple is needed", "change heads_kv"
        )
    if shape.vocab < 300:
        refuse(f"vocab {shape.vocab}", "256 bytes, an end token and merges need 300", "raise it")
    if shape.fused and shape.arch != "hy_v3":
        refuse(
            "fused gate and up", "llama.cpp loads it for hy_v3 only, of the shapes here", "use test-shared"
        )
