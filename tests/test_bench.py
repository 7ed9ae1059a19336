"""bench: both sides decode in processes of their own, and the table says how fast, how large, and with what."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import microbat.bench
from microbat.bench import _peak, bench
from microbat.cli import app
from microbat.kv import KVQuantizer
from microbat.linear import SiteInput
from microbat.runtime.load import load, load_dequantized, load_plain


@pytest.fixture(scope="module")
def folder(tiny, text_file, tmp_path_factory):
    """Clips and transforms online, a quantized cache, biases."""
    return microbat.quantize(
        tiny("qwen2", num_attention_heads=2, num_key_value_heads=1),  # heads of 32 lanes
        out=tmp_path_factory.mktemp("bench") / "q",
        method="batquant",
        scheme="W4A8KV4",
        settings={"epochs": 1},
        calibration=str(text_file),
        num_calibration_samples=8,
        max_seq_length=32,
    )


@pytest.fixture(scope="module")
def result(folder):
    return bench(folder, device=torch.device("cpu"), tokens=3, prompt=4, rounds=1, threads=1, backend="torch")


def test_both_sides_and_their_ratios(folder, result):
    assert result.ratio("speed") == result.packed.speed / result.bf16.speed > 0
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert (result.packed.weights, result.bf16.linear) == (weights * 4.25 / 8, weights * 2)
    assert result.ratio("linear") == (result.packed.weights + result.packed.online) / result.bf16.linear
    vectors = 2 * (64 + 2 * 32 + 2 * 64) + 64  # biases of queries, keys, values; norms
    assert result.bf16.checkpoint == 2 * (weights + 257 * 64 + vectors)  # embedding and head are one tensor
    assert result.packed.checkpoint == json.loads((folder / "report.json").read_text())["bytes"]["total"]
    for side in (result.packed, result.bf16):  # a tiny model on top of torch and transformers
        assert 100e6 < side.libraries < min(side.loading, side.decoding) < side.libraries + 200e6
    # per block a site of 96 and three of 64: clip ratios of float32, and the transforms' numbers
    assert result.packed.online > 2 * (96 + 3 * 64) // 32 * 2 * 4
    assert "3 tokens after 4, best of 1; cpu, 1 threads, backend torch" in result.setting
    assert f"transformers {transformers.__version__}" in result.setting


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux sets the peak back")
def test_the_peak_is_that_since_the_last_one():
    cpu = torch.device("cpu")
    _peak(cpu)
    before = _peak(cpu)
    torch.ones(25_000_000)  # 100 MB, there for a moment
    assert before + 90e6 < _peak(cpu) < before + 200e6
    assert _peak(cpu) < before + 50e6


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is mapped")
def test_no_shard_stays_in_memory_beside_its_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "q")
    model = load(copy, dtype=torch.float32)  # as stored: norms, biases and clips need no conversion
    assert f"{copy}/microbat-block" not in Path("/proc/self/maps").read_text()
    del model


def test_a_tied_head_is_in_memory_once(folder):
    for model in (load(folder, dtype=torch.bfloat16), load_plain(folder, dtype=torch.bfloat16)):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_other_side_quantizes_nothing(folder):
    model = load_plain(folder, dtype=torch.bfloat16)
    assert not any(isinstance(module, SiteInput | KVQuantizer) for module in model.modules())
    expected = load_dequantized(folder, dtype=torch.bfloat16).get_submodule("model.layers.1.self_attn.q_proj")
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert type(layer) is torch.nn.Linear
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, expected.bias)


def test_the_verb(folder, result, tiny, monkeypatch):
    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    assert "prompt=3 and tokens=300 do not fit the model's context of 256" in run(
        folder, "--prompt", 3, "--tokens", 300, code=2
    )
    assert "not a microbat folder" in run(tiny(), code=2)
    asked = {}
    monkeypatch.setattr(microbat.bench, "bench", lambda folder, **options: asked.update(options) or result)
    output = run(folder, "--tokens", 2, "--prompt", 3, "--rounds", 1, "--device", "cpu", "--backend", "torch")
    numbers = {"tokens": 2, "prompt": 3, "rounds": 1, "threads": 0}
    assert asked == {**numbers, "device": torch.device("cpu"), "backend": "torch"}
    assert "packed / BF16" in output
    assert "peak memory while decoding" in output
    assert f"torch {torch.__version__.split('+')[0]}" in output
