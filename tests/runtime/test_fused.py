"""Layers side by side compute what they compute apart; names of an engine's modules find their layers."""

import re

import pytest
import torch

import microbat
from microbat.export.folder import block_shard
from microbat.export.shard import read_block
from microbat.kv import KVQuantizer
from microbat.runtime.fused import TokenCache, experts, fuse, locate, not_floats

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def folder(tiny, text_file, tmp_path_factory):
    """Transforms, clips, biases, a quantized cache, and one layer in float."""
    out = tmp_path_factory.mktemp("fused") / "q"
    options = {"method": "batquant", "scheme": "W4A4KV4", "settings": {"epochs": 1}, "calibration": str(text_file)}
    return microbat.quantize(
        tiny("qwen2", hidden_size=128), out=out, ignore=("model.layers.1.self_attn.k_proj",), **options, **FAST
    )


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_side_by_side_is_apart(folder, index, dtype, tokens):
    stored = read_block(folder / block_shard(index))
    model = microbat.load(folder, dtype=dtype)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(5)).to(dtype)
    for module, parent in (("qkv_proj", "self_attn"), ("gate_up_proj", "mlp")):
        paths = [f"{parent}.{name}" for name in FUSED[module]]
        apart = [model.get_submodule(f"model.layers.{index}.{path}")(x) for path in paths]
        assert torch.equal(fuse(stored, paths, dtype=dtype)(x), torch.cat(apart, dim=-1))


@pytest.mark.parametrize(("method", "scheme"), [("arcquant", "W4A4:nvfp4"), ("micromix", "W4A4")])
def test_wide_and_mixed_layers_as_well(tiny, text_file, tmp_path, method, scheme):
    options = {
        "scheme": scheme,
        "calibration": str(text_file),
        "settings": {"unit": 32} if method == "micromix" else {},
    }
    out = microbat.quantize(tiny("qwen2"), out=tmp_path / "q", method=method, **options, **FAST)
    stored, model = read_block(out / block_shard(1)), microbat.load(out)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    paths = [f"self_attn.{name}" for name in FUSED["qkv_proj"]]
    assert [stored.quantized.shape(path) for path in paths] == [(64, 64), (32, 64), (32, 64)]
    apart = [model.get_submodule(f"model.layers.1.{path}")(x) for path in paths]
    assert torch.equal(fuse(stored, paths, dtype=torch.float32)(x), torch.cat(apart, dim=-1))


def test_what_is_shared_is_computed_once(folder, monkeypatch):
    from microbat.linear import SiteInput

    calls = []
    compute = SiteInput._compute
    monkeypatch.setattr(SiteInput, "_compute", lambda self, x: calls.append(self) or compute(self, x))
    stored = read_block(folder / block_shard(0))
    fuse(stored, [f"self_attn.{name}" for name in FUSED["qkv_proj"]], dtype=torch.float32)(torch.randn(5, 128))
    assert len(calls) == 1


def test_without_biases(folder):
    stored = read_block(folder / block_shard(0))
    x = torch.randn(5, 128)
    paths = ["self_attn.k_proj", "self_attn.v_proj"]
    with_biases, without = (fuse(stored, paths, dtype=torch.float32, biases=b)(x) for b in (True, False))
    bias = torch.cat([stored.floats[f"{path}.bias"] for path in paths])
    torch.testing.assert_close(with_biases, without + bias)
    assert not torch.equal(with_biases, without)


def test_new_tokens_are_quantized_as_in_attention(folder):
    kv = read_block(folder / block_shard(0)).quantized.kv
    assert kv.transform is not None
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(7, heads * 32, generator=generator) for heads in (4, 2, 2))
    found = TokenCache(kv, 32)(query, key, value)
    heads = [t.unflatten(1, (-1, 32)).transpose(0, 1)[None] for t in (query, key, value)]
    wanted = [t[0].transpose(0, 1).flatten(1) for t in KVQuantizer(kv.key, kv.value, kv.transform)(*heads)]
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_an_engine_are_those_of_the_model(tiny, text_file, tmp_path, dtype):
    """One of their three layers in float."""
    options = {"scheme": "W4A8", "ignore": ("re:experts.up_proj$",), "calibration": str(text_file), **FAST}
    folder = microbat.quantize(tiny("mixtral"), out=tmp_path / "q", method="quarot", **options)
    own = experts(read_block(folder / block_shard(1)), "mlp.experts", torch.nn.SiLU(), 2, dtype=dtype)
    whole = microbat.load(folder, dtype=dtype).get_submodule("model.layers.1.mlp.experts")
    assert [type(own.get_submodule(name)).__name__ for name in ("gate_proj", "up_proj")] == [
        "PackedExperts",
        "ExpertLinear",
    ]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 64, generator=generator).to(dtype)
    weights, index = torch.rand(9, 3, generator=generator).topk(2)
    assert torch.equal(own(x, index.to(torch.int32), weights), whole(x, index, weights))


def test_what_an_engine_does_not_load():
    pattern = re.compile(not_floats("model.layers", [], modules=["model.layers.1.mlp.experts"]))
    ours = ("experts.7.gate_proj.weight_packed", "experts.7.gate_proj.0.weight", "experts.up_proj.weight")
    assert all(pattern.match(f"model.layers.1.mlp.{name}") for name in ours)
    assert not pattern.match("model.layers.0.mlp.experts.up_proj.weight")
    assert not pattern.match("model.layers.1.mlp.gate.weight")
    pattern = re.compile(not_floats("model.layers", ["model.layers.0.mlp.up_proj"]))
    ours = ("up_proj.weight_packed", "up_proj.0.weight_packed", "up_proj.2.weight", "up_proj.1.weight_scale")
    assert all(pattern.match(f"model.layers.0.mlp.{name}") for name in ours)
    assert not pattern.match("model.layers.0.mlp.up_proj.bias")
    assert not pattern.match("model.layers.1.mlp.up_proj.weight")


def test_names_of_modules_find_their_layers():
    assert locate("model.layers.12.self_attn.qkv_proj", "model.layers", FUSED) == (
        12,
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    )
    assert locate("model.layers.0.mlp.down_proj", "model.layers", FUSED) == (0, ("mlp.down_proj",))
    assert locate("model.layers.0.self_attn.attn", "model.layers", FUSED) == (0, ("self_attn.attn",))
    assert locate("lm_head", "model.layers", FUSED) is None
    assert locate("draft.layers.0.mlp.down_proj", "model.layers", FUSED) is None


def test_floats_are_left_to_the_engine(folder):
    from microbat.export.folder import INDEX
    from microbat.models.checkpoint import Checkpoint

    names = {*Checkpoint(folder, index=INDEX).names, "tokens", "outputs"}
    packed = [f"{i}.{path}" for i in (0, 1) for path in read_block(folder / block_shard(i)).quantized.weights]
    pattern = re.compile(not_floats("model.layers", {f"model.layers.{layer}" for layer in packed}))
    left = {name for name in names if not pattern.search(name)}
    assert {name for name in left if "norm" in name or "bias" in name} == {
        n for n in names if "norm" in n or "bias" in n
    }
    assert left - {name for name in left if "norm" in name or "bias" in name} == {
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
    }
