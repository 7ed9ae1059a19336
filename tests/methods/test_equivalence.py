"""With quantizers off, every method leaves the model's function as it was: GQA, tied embeddings, Qwen3's own head size; of
vision-language models, on images of several sizes, towers with biases, DeepStack, windows and widths to be padded."""

from pathlib import Path

import pytest
import torch

from microbat import native, pipeline
from microbat.calibrate.engine import calibrate
from microbat.calibrate.job import Job
from microbat.export.shard import float_tensors
from microbat.formats.block import QTensor
from microbat.linear import install
from microbat.methods.base import ModelData, Preparer
from microbat.methods.rtn import RTN
from microbat.models.checkpoint import Checkpoint
from microbat.models.padding import padded
from microbat.models.rotation import RotatedCheckpoint
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.recipe import methods
from microbat.scheme import Scheme

PREPARERS = {name: kind for name, kind in methods().items() if issubclass(kind, Preparer)}
SETTINGS = {
    # Refining fits the activations' side to codes that have no error here: Adam would follow rounding noise.
    "batquant": {"epochs": 2, "clip": False, "weight_clip": False, "init": "orthogonal", "refine_epochs": 0},
    "d2quant": {"dual": False},  # its formats are not quantized to by AbsMax
    "flatquant": {"epochs": 1},
    "brq": {"steps": 2},
    "smoothquant": {"alpha": 0.6},
    "spinquant": {"steps": 2},
    "batquant-paper": {"epochs": 1, "clip": False, "weight_clip": False},
}


class Exact(QTensor):
    def dequantize(self):
        return self.codes


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"]
)
@pytest.mark.parametrize("name", PREPARERS)
def test_float_function_is_kept(tiny, pairs, monkeypatch, name, family):
    exact = lambda self, x: Exact(format=self.format, codes=x, scales=x[..., :: self.format.block])  # noqa: E731
    monkeypatch.setattr(AbsMax, "fake", lambda self, x, low=None, high=None: x.to(torch.float32))
    monkeypatch.setattr(AbsMax, "quantize", exact)
    monkeypatch.setattr(Clip, "clip", lambda self, x: x)
    monkeypatch.setattr(native, "available", lambda *tensors: False)  # it would quantize in one pass with the transform
    original = Checkpoint(tiny(family) if family == "qwen3" else tiny(family, hidden_size=128))  # heads of 32 lanes
    original = padded(original, original.family.stacks, 32)
    samples = pairs if original.family.towers else ()
    settings = {"unit": 32} if samples and name == "micromix" else {}
    preparer = PREPARERS[name](**SETTINGS.get(name, {}), **settings)
    tokens = torch.randint(2, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    scheme = Scheme.parse("W4A4KV4")
    rotation = preparer.rotation(
        ModelData(
            checkpoint=original,
            tokens=tokens,
            pairs=samples,
            scheme=scheme,
            seed=3,
            device=torch.device("cpu"),
            precision="float32",
            progress=print,
        )
    )
    checkpoint = original if rotation is None else RotatedCheckpoint(original, rotation)
    blocks = {}

    class Keeper:
        def has(self, index):
            return False

        def save(self, index, block, module, record):
            blocks[index] = block, float_tensors(module)

        def finish(self, tokens, outputs):
            pass

    job = Job(
        checkpoint=checkpoint,
        scheme=scheme,
        preparers=(preparer,),
        solver=RTN(),
        tokens=tokens,
        pairs=samples,
        seed=0,
        precision="float32",
        device=torch.device("cpu"),
        scratch=Path(),
    )
    list(calibrate(job, Keeper(), lambda *a: {}, lambda *a: None))
    float_model, model = pipeline.load(original.path), checkpoint.load()
    assert sum(len(block.weights) for block, _ in blocks.values()) == {
        "qwen3_vl": 3 * 7 + 3 * 4,
        "qwen3_vl_moe": 3 * 7 + 3 * 4,
        "qwen2_5_vl": 3 * 7 + 3 * 5,
    }.get(family, 2 * 7)
    for index, (block, floats) in blocks.items():
        module = model.get_submodule(checkpoint.blocks[index][1])
        install(module, block)
        module.load_state_dict(floats, strict=False)
    for sample in samples or ({"input_ids": tokens},):
        with torch.no_grad():
            before, after = float_model(**sample).logits, model(**sample).logits
        assert (before - after).abs().max() < 1e-3


def test_rotation_moves_the_stream(tiny):
    """The equivalence above is not that of doing nothing."""
    original = Checkpoint(tiny("qwen3"))
    data = ModelData(
        checkpoint=original,
        tokens=torch.zeros(1, 4, dtype=torch.int64),
        scheme=Scheme.parse("W4A4"),
        seed=3,
        device=torch.device("cpu"),
        precision="float32",
        progress=lambda *x: None,
    )
    for name in ("quarot", "brq"):
        rotated = RotatedCheckpoint(original, PREPARERS[name]().rotation(data))
        key = "model.layers.0.mlp.down_proj.weight"
        assert (rotated.tensor(key) - original.tensor(key)).abs().max() > 0.05
        assert "lm_head.weight" in rotated.names
        assert "lm_head.weight" not in original.names
