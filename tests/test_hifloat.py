"""HiF4 and HiF8 in every role: from a model to a folder and back, with learned maps and clips, GPTQ, a quantized cache."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import microbat
from microbat.cli import app
from microbat.export.shard import read_block
from microbat.kv import KVQuantizer
from microbat.quantizers.base import AbsMax
from microbat.runtime.load import load_dequantized
from microbat.runtime.packed import PackedLinear
from microbat.scheme import Scheme, formats
from microbat.verify import verify

FAST = {"num_calibration_samples": 4, "max_seq_length": 32, "precision": "float32"}
SIZE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TOKENS = torch.arange(2, 26)[None]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    ("scheme", "method", "solver"),
    [
        ("W4A4KV4:hif4", "batquant", "learned"),
        ("W4A4KV8:hif4,hif8", "batquant", "gptq"),
        ("W8A8KV8:hif8", "gptq", ""),
        ("W4A16:hif4_ascend", "rtn", ""),
    ],
)
def test_from_model_to_folder_and_back(tiny, text_file, tmp_path, scheme, method, solver):
    settings = {"epochs": 1} if method == "batquant" else {}
    out = microbat.quantize(
        tiny("qwen3", **SIZE),
        out=tmp_path / "q",
        method=method,
        solver=solver,
        scheme=scheme,
        settings=settings,
        calibration=str(text_file),
        **FAST,
    )
    model = microbat.load(out)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert {layer.backend for layer in layers} == {"torch"}
    with torch.no_grad():
        logits, exact = model(TOKENS).logits, load_dequantized(out)(TOKENS).logits
    torch.testing.assert_close(logits, exact, rtol=1e-4, atol=1e-4)
    verdict = verify(out)
    assert verdict.passed
    assert verdict.error == 0
    report = run("inspect", out)
    assert "torch" in report
    assert "weights: hif" in report
    block = read_block(out / "microbat-block-000.safetensors").quantized
    if method == "batquant":
        assert {site.transform.block for site in block.sites if site.transform is not None} == {64}
        assert block.sites[0].quantizer.ratios.shape == (2, 2)  # a clip for each of two units of 64
    contract = json.loads((out / "config.json").read_text())["quantization_config"]
    told = contract["weights"].get("rounding")
    assert told == (None if "ascend" in scheme else "nearest, ties away from zero")
    if "KV" in scheme:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            plain = model.generate(TOKENS, **options)
            cache = microbat.QuantizedCache(model)
            stored = model.generate(TOKENS, past_key_values=cache, **options)
        assert torch.equal(plain, stored)
        bits = 4.5 if scheme.endswith("KV4:hif4") else 8 + 8 / 64
        assert cache.nbytes == 2 * 2 * (stored.shape[1] - 1) * 64 * bits / 8


def test_an_altered_flag_is_refused_and_engines_without_the_format_too(tiny, text_file, tmp_path):
    out = microbat.quantize(
        tiny("qwen3", **SIZE), out=tmp_path / "q", method="rtn", scheme="W4A4:hif4", calibration=str(text_file), **FAST
    )
    output = run("export", out, "--target", "transformers", "--out", tmp_path / "e", code=2)
    assert "hif4 weights with hif4 activations" in " ".join(output.split())
    shard = out / "microbat-block-001.safetensors"
    tensors = load_file(shard)
    with safe_open(shard, framework="pt") as opened:
        metadata = opened.metadata()
    name = "model.layers.1.mlp.up_proj.weight_scale"
    assert tensors[name].shape == (192, 2 * 4)
    tensors[name][3, 5] ^= 0x10
    save_file(tensors, shard, metadata)
    with pytest.raises(ValueError, match=f"{name}.*altered"):
        microbat.load(out)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W4A4:hif4", r"K=96 is not a multiple of hif4's block of 64 \(scheme W4A4:hif4\)"),
        ("W4A8KV4:hif4", "the cache: a head has 16 lanes, not a multiple of hif4's block of 64"),
    ],
)
def test_widths_that_64_does_not_divide_are_refused_before_work(tiny, text_file, tmp_path, scheme, message):
    with pytest.raises(ValueError, match=message):
        microbat.quantize(tiny(), out=tmp_path / "q", method="rtn", scheme=scheme, calibration=str(text_file), **FAST)
    assert list(tmp_path.iterdir()) == []


def test_schemes_and_rules():
    scheme = Scheme.parse("W4A8KV8:hif4,hif8")
    assert [q.format.name for q in (scheme.weight, scheme.activation, scheme.cache)] == ["hif4", "hif8", "hif8"]
    assert [q.rule for q in (scheme.weight, scheme.activation)] == ["absmax", "floor"]
    assert scheme.block is None
    assert Scheme.parse("W4A4:hif4", scale_rule="mse").block == 64
    assert Scheme.parse("W4A4:nvfp4", scale_rule="four_over_six").weight.rule == "four_over_six"
    with pytest.raises(ValueError, match="hif8 under rule 'pts' scales a whole tensor"):
        Scheme.parse("W8A8KV8:hif8", scale_rule="pts")
    Scheme.parse("W8A8:hif8", scale_rule="pts")
    with pytest.raises(ValueError, match="'floor' does not fit format 'hif4' .allowed: absmax, mse"):
        Scheme.parse("W4A4:hif4", scale_rule="floor")
    with pytest.raises(ValueError, match="unknown format 'hif5'; did you mean 'hif"):
        Scheme.parse("W4A4:hif5")


def test_formats_are_listed():
    listed = run("list", "formats")
    rows = {line.split("│")[1].strip(): line for line in listed.splitlines() if line.startswith("│")}
    assert "e6m2 / 64 + e1 / 8 + e1 / 4" in rows["hif4"]
    assert "4.500" in rows["hif4"]
    assert "floor, mse, unit, pts" in rows["hif8"]
    assert "absmax, four_over_six" in rows["nvfp4"]
    assert {"hif4_amct", "hif4_ascend"} <= set(rows)


@pytest.mark.parametrize("name", ["hif4", "hif8"])
def test_a_cache_of_one_token_is_that_of_many(name):
    """Every token's keys and values are quantized alone: what is stored one by one is what calibration saw."""
    kv = KVQuantizer(AbsMax(format=formats()[name]), AbsMax(format=formats()[name]))
    states = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(1))
    _, whole, _ = kv(states, states, states)
    alone = torch.cat([kv.store(token, token)[0].dequantize() for token in states.split(1, dim=2)], dim=2)
    assert torch.equal(whole, alone)
