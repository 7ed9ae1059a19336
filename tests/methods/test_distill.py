"""The whole quantized model against the float model's logits: what learns, what stays, and that an interrupted run ends alike."""

import json
import os

import pytest
import torch

import microbat
from microbat import pipeline
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.runtime.load import load_dequantized
from microbat.verify import verify

OPTIONS = {
    "method": "batquant",
    "solver": "gptq",
    "num_calibration_samples": 8,
    "max_seq_length": 32,
    "scheme": "W4A4KV4",
}
BLOCKWISE = {"epochs": 1, "refine_epochs": 0, "distill_epochs": 0, "distill_lr": 3e-3}


def quantize(tiny, text_file, out, **settings):
    settings = {**BLOCKWISE, **settings}
    options = {**OPTIONS, "calibration": str(text_file), "precision": "float32", "settings": settings}
    return microbat.quantize(tiny("qwen3", head_dim=32), out=out, **options)


@pytest.fixture(scope="module")
def distilled(tiny, text_file, tmp_path_factory):
    return quantize(tiny, text_file, tmp_path_factory.mktemp("distilled") / "q", distill_epochs=12)


def test_it_nears_the_float_model_and_leaves_the_codes(tiny, text_file, tmp_path, distilled):
    blockwise = quantize(tiny, text_file, tmp_path / "q")
    tokens = pipeline._calibration(
        microbat.Recipe(**json.loads((blockwise / "recipe.json").read_text())["recipe"]),
        folders.Checkpoint(tiny("qwen3", head_dim=32)),
        tmp_path / "tokens.safetensors",
        torch.device("cpu"),
    ).tokens
    reference = microbat.load(tiny("qwen3", head_dim=32))

    def divergence(folder):
        with torch.no_grad():
            p, q = (m(tokens).logits.log_softmax(-1) for m in (reference, load_dequantized(folder)))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    assert divergence(distilled) < 0.9 * divergence(blockwise)
    changed = set()
    for index in range(2):
        before, after = (shards.read_shard(f / folders.block_shard(index))[1] for f in (blockwise, distilled))
        changed |= {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert not [name for name in changed if "weight_packed" in name or "weight_scale" in name]
    for part in ("sites.qkv.transform.A", "sites.down.clip", "kv.transform.B", "kv.value_clip", "q_norm.weight"):
        assert any(part in name for name in changed), part
    report = json.loads((distilled / "report.json").read_text())
    assert len(report["distillation"]["loss"]) == 12 * 8
    assert verify(distilled).passed
    assert not list(distilled.glob("distilled*"))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_interrupted_it_ends_with_the_same_bytes(tiny, text_file, tmp_path, distilled, monkeypatch, moved):
    """Killed while the new shards take the place of the old ones, after ``moved`` of them."""
    real, calls = os.replace, []

    def replace(source, target):
        if str(source).rpartition("/")[2].startswith("distilled-microbat") and str(source).endswith("safetensors"):
            if len(calls) == moved:
                raise KeyboardInterrupt
            calls.append(source)
        real(source, target)

    monkeypatch.setattr(pipeline.os, "replace", replace)
    if moved < 2:
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny, text_file, tmp_path / "q", distill_epochs=12)
    monkeypatch.undo()
    again = quantize(tiny, text_file, tmp_path / "q", distill_epochs=12)
    for file in (*distilled.glob("*.safetensors"),):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_negative_rate_is_refused():
    with pytest.raises(ValueError, match=r"batquant.distill_lr=-1.0 must be 0 or more"):
        microbat.Recipe(model="x", method="batquant", settings={"distill_lr": -1}).methods()


def test_a_model_too_large_for_the_memory_is_refused_before_work(tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "total_memory", lambda device: 100_000)
    with pytest.raises(ValueError, match=r"distills the whole model at once \(distill_epochs=0 .* cpu has 0.0 GB"):
        quantize(tiny, text_file, tmp_path / "q", distill_epochs=12)
    assert not list(tmp_path.iterdir())
