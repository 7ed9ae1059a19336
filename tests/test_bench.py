"""bench: both sides decode, and the table says how fast, how large, and with what."""

import pytest
import torch
import transformers
from typer.testing import CliRunner

import microbat
from microbat.bench import bench
from microbat.cli import app
from microbat.kv import KVQuantizer
from microbat.linear import SiteInput
from microbat.runtime.load import load_dequantized, load_plain


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


def test_both_sides_and_their_ratios(folder):
    threads = torch.get_num_threads()
    result = bench(folder, device=torch.device("cpu"), tokens=3, prompt=4, rounds=1, threads=1)
    assert torch.get_num_threads() == threads
    assert result.speed == result.packed.speed / result.bf16.speed > 0
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert (result.packed.weights, result.bf16.nbytes) == (weights * 4.25 / 8, weights * 2)
    assert result.memory == (result.packed.weights + result.packed.online) / result.bf16.nbytes
    # per block a site of 96 and three of 64: clip ratios of float32, and the transforms' numbers
    assert result.packed.online > 2 * (96 + 3 * 64) // 32 * 2 * 4
    assert "3 tokens after 4, best of 1; cpu, 1 threads, backend" in result.setting
    assert f"transformers {transformers.__version__}" in result.setting


def test_the_other_side_quantizes_nothing(folder):
    model = load_plain(folder, dtype=torch.bfloat16)
    assert not any(isinstance(module, SiteInput | KVQuantizer) for module in model.modules())
    expected = load_dequantized(folder, dtype=torch.bfloat16).get_submodule("model.layers.1.self_attn.q_proj")
    layer = model.get_submodule("model.layers.1.self_attn.q_proj")
    assert type(layer) is torch.nn.Linear
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, expected.bias)


def test_the_verb(folder, tiny):
    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    output = run(folder, "--tokens", 2, "--prompt", 3, "--rounds", 1, "--device", "cpu")
    assert "packed / BF16" in output
    assert f"torch {torch.__version__.split('+')[0]}" in output
    assert "prompt=3 and tokens=300 do not fit the model's context of 256" in run(
        folder, "--prompt", 3, "--tokens", 300, code=2
    )
    assert "not a microbat folder" in run(tiny(), code=2)
