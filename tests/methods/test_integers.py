"""Formats whose blocks are whole rows: what methods make of them, and what is refused before any work."""

import pytest
import torch

from microbat import pipeline
from microbat.recipe import Recipe

SCHEMES = ("W8A8:int8", "W4A8:int4_row,int8")


def recipe(tiny, text_file, method, scheme="W8A8:int8", solver="rtn", **settings):
    model = tiny("llama", hidden_size=128, intermediate_size=192, attention_bias=True)
    return Recipe(
        model=str(model), method=method, solver="" if method == "rtn" else solver, scheme=scheme,
        calibration=str(text_file), num_calibration_samples=2, max_seq_length=32, precision="float32", settings=settings,
    )  # fmt: skip


def test_outliers_are_smoothed_or_rotated_away(tiny, text_file, tmp_path):
    """A token shares one scale, so that a channel twelve times as large costs all others their bits."""
    tokens = torch.arange(2, 34)[None]
    errors = {}
    with torch.no_grad():
        for method in ("rtn", "smoothquant", "quarot"):
            chosen = recipe(tiny, text_file, method)
            pipeline.run(chosen, tmp_path / method)
            model, exact = pipeline.load(tmp_path / method), pipeline.load(chosen.model)(tokens).logits
            errors[method] = ((model(tokens).logits - exact).std() / exact.std()).item()
    assert errors["smoothquant"] < 0.8 * errors["rtn"]
    assert errors["quarot"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("method", "reason"),
    [("soar", "has none"), ("arcquant", "int8 activations a row"), ("micromix", "replace W.A8:.* by W4A4")],
)
def test_methods_of_other_formats_are_refused(tiny, text_file, method, reason, scheme):
    solver = "" if method == "soar" else "gptq"
    with pytest.raises(ValueError, match=reason):
        recipe(tiny, text_file, method, scheme, solver).methods()


def test_block_transforms_as_wide_as_the_layer(tiny, text_file):
    settings = {"transform": "hadamard", "epochs": 0}
    with pytest.raises(ValueError, match="mlp.down_proj.*blocks of 192 .* are no power of two; --set g=64 is"):
        pipeline.check(recipe(tiny, text_file, "batquant", **settings))
    pipeline.check(recipe(tiny, text_file, "batquant", g=64, **settings))
    with pytest.raises(ValueError, match="g1=5 does not divide the transform block, which is 128; --set g1=1 does"):
        pipeline.check(recipe(tiny, text_file, "batquant", g1=5))
    with pytest.raises(ValueError, match="batquant.g=48 does not divide 128 channels; --set g=0"):
        pipeline.check(recipe(tiny, text_file, "batquant", g=48))
