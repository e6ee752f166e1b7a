# SPDX-License-Identifier: MIT
"""Synthetic MoE models load in stock llama.cpp, are reproducible, and route as locally as asked."""

import gguf
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner

from models import blocks, locality, routing, synth
from models.plan import MODEL_TYPES

pytestmark = pytest.mark.model

TEXT = b"in the beginning there was a test"


def logits_of(path):
    """Logits of a fixed text, (tokens, n_vocab), by stock llama.cpp."""
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    ids = model.tokenize(TEXT)
    assert len(ids) < len(TEXT), "letter pairs were not merged"
    assert model.detokenize(ids) == TEXT
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    model.close()
    return logits


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of the default shape, and its logits."""
    path = synth.synthesize(tmp_path_factory.mktemp("synth") / "small.gguf")
    return path, logits_of(path)


@pytest.mark.parametrize(
    "shape, kind",
    [
        *(("test", kind) for kind in MODEL_TYPES),
        ("test-llama", "q4_0"),
        ("test-gpt-oss", "mxfp4"),
        ("test-shared", "q8_0"),
    ],
)
def test_loads_with_sane_logits(tmp_path, shape, kind):
    logits = logits_of(synth.synthesize(tmp_path / "m.gguf", shape, type=kind))
    assert np.isfinite(logits).all()
    assert 1.0 < logits[:, 1:].std() < 4.0
    assert (logits.argmax(axis=1) != 0).all(), "end of text must not win"


def test_fused_gate_up_loads(tmp_path):
    path = synth.synthesize(tmp_path / "m.gguf", "test-shared", fused=True)
    names = {t.name for t in gguf.GGUFReader(path).tensors}
    assert "blk.0.ffn_gate_up_exps.weight" in names and "blk.0.ffn_up_exps.weight" not in names
    assert np.isfinite(logits_of(path)).all()


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k", "q6_k", "mxfp4", "bf16", "f16", "f32"])
def test_blocks_have_the_asked_spread(kind):
    """Measured with gguf's own dequantisation, which shares no code with the writer."""
    qtype = blocks.TYPES[kind]
    values = gguf.quants.dequantize(blocks.random_blocks(qtype, 2000, 0.02, np.random.default_rng(0)), qtype)
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert abs(values.mean()) < 0.001


def test_same_seed_same_bytes_other_seed_other_logits(small, tmp_path):
    path, logits = small
    again = synth.synthesize(tmp_path / "again.gguf")
    assert again.read_bytes() == path.read_bytes()
    other = logits_of(synth.synthesize(tmp_path / "other.gguf", seed=1))
    assert np.abs(other - logits).max() > 1.0


def test_experts_all_differ(small):
    seen = set()
    for tensor in gguf.GGUFReader(small[0]).tensors:
        if "_exps." in tensor.name:
            assert len(tensor.data) == 16
            seen.update(expert.tobytes() for expert in tensor.data)
    assert len(seen) == 4 * 3 * 16


def test_wrong_expert_changes_logits(small, tmp_path):
    """Rotate the experts of one layer's down matrix, as if a pager mixed up slots."""
    path, logits = small
    data = bytearray(path.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.2.ffn_down_exps.weight")
    n = tensor.n_bytes // 16
    rolled = np.roll(np.frombuffer(data, np.uint8, tensor.n_bytes, tensor.data_offset), n)
    data[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = rolled.tobytes()
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(data)
    assert np.abs(logits_of(wrong) - logits).max() > 0.3


def test_shards_load_and_equal_the_whole(small, tmp_path):
    first = synth.synthesize(tmp_path / "split.gguf", shards=3)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"split-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert first.name == "split-00001-of-00003.gguf"
    np.testing.assert_array_equal(logits_of(first), small[1])


def test_every_shard_has_tensors():
    tensors = synth.Plan(synth.SHAPES["test"], "q4_0", 0, 0.0).tensors
    for shards in (1, 2, 7, len(tensors)):
        parts = synth.split_evenly(tensors, shards)
        assert all(parts) and [t for part in parts for t in part] == tensors
    with pytest.raises(ValueError, match="shards"):
        synth.split_evenly(tensors, len(tensors) + 1)


@pytest.mark.parametrize("target, n_expert, n_used", [(0.25, 64, 6), (0.55, 64, 6)])
def test_overlap_meets_the_target(tmp_path, target, n_expert, n_used):
    path = synth.synthesize(
        tmp_path / "m.gguf", layers=8, experts=n_expert, used=n_used, ff=32, locality=target
    )
    trace = routing.record(path, 120, n_threads=1)[20:]
    assert trace.shape == (100, 8, n_used) and trace.max() < n_expert
    # Eight routers of one seed scatter by some points about the mean over seeds.
    assert routing.overlap(trace) == pytest.approx(target, abs=0.06)


def test_no_locality_is_chance(tmp_path):
    trace = routing.record(
        synth.synthesize(tmp_path / "m.gguf", layers=8, experts=64, ff=32), 100, n_threads=1
    )
    assert routing.overlap(trace) == pytest.approx(4 / 64, abs=0.03)


def test_strength_grows_with_the_target():
    strengths = [locality.strength_for(t, 64, 4, 64, 1e6) for t in (0.1, 0.3, 0.5, 0.7)]
    assert 0 < strengths[0] < strengths[1] < strengths[2] < strengths[3]


def test_overlap_and_lru_by_hand():
    # One layer, two experts per token: {0,1} {1,2} {1,2} {3,0}. Shared with the token before: 1, 2, 0 of 2.
    trace = np.array([[[0, 1]], [[1, 2]], [[1, 2]], [[3, 0]]])
    assert routing.overlap(trace) == pytest.approx(0.5)
    assert routing.overlap(trace, 2) == pytest.approx(0.25)
    assert routing.overlap(trace, 4) is None
    # LRU of 2, asked in order of id: 0 1 miss; 1 hit, 2 misses and evicts 0; 1 2 hit; 0 3 miss. 3 of 8.
    assert routing.lru_hit_rate(trace, 2) == pytest.approx(3 / 8)
    # LRU of 3 keeps 0 until 2 comes with room: then 0 hits in the last token. 4 of 8.
    assert routing.lru_hit_rate(trace, 3) == pytest.approx(4 / 8)
    assert routing.usage_entropy(np.array([[[0, 1]], [[2, 3]]]), 4) == pytest.approx(1.0)


def test_read_csv_takes_decode_only(tmp_path):
    path = tmp_path / "x.route.csv"
    path.write_text(
        "# route_trace v1\n# model=m n_layer=1 n_expert=8 n_expert_used=2\n"
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
        "0,0,0,0,0,7,0.5,0,1\n0,0,0,0,1,6,0.5,0,1\n0,1,0,0,0,3,0.5,0,1\n0,1,0,0,1,2,0.5,0,1\n"
    )
    trace, n_expert = routing.read_csv(path)
    assert trace.tolist() == [[[3, 2]]] and n_expert == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shape": "nope"}, "no 'nope'"),
        ({"used": 17}, "17 of 16"),
        ({"type": "q9"}, "type q9"),
        ({"type": "q4_k", "ff": 96}, "blocks of 256"),
        ({"embd": 250}, "multiples of 32"),
        ({"locality": 0.1}, "cannot be reached"),
        ({"fused": True}, "hy_v3"),
        ({"width": 1}, "cannot override"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        synth.synthesize(tmp_path / "m.gguf", **arguments)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path):
    path = tmp_path / "cli.gguf"
    result = CliRunner().invoke(
        synth.main, [str(path), "--layers", "2", "--experts", "8", "--locality", "none"]
    )
    assert result.exit_code == 0, result.output
    fields = gguf.GGUFReader(path).fields
    assert (fields["qwen3moe.block_count"].contents(), fields["qwen3moe.expert_count"].contents()) == (2, 8)
    refused = CliRunner().invoke(synth.main, [str(path), "--used", "99"])
    assert refused.exit_code == 1 and "99 of 16" in refused.output
