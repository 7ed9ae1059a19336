"""Formats whose blocks are whole rows: their laws, what methods make of them, and what is refused before any work."""

import math

import pytest
import torch

from microbat import pipeline
from microbat.formats.integer import INT4_GROUP, INT4_ROW, INT8_ROW
from microbat.quantizers.base import AbsMax
from microbat.recipe import Recipe
from microbat.runtime import reference

RULES = ("absmax", "full_range")  # 127 for the largest magnitude, and openPangu's 127.5
SCHEMES = ("W8A8:int8", "W4A8:int4_row,int8")


def recipe(tiny, text_file, method, scheme="W8A8:int8", solver="rtn", **settings):
    model = tiny("llama", hidden_size=128, intermediate_size=192, attention_bias=True)
    return Recipe(
        model=str(model), method=method, solver="" if method == "rtn" else solver, scheme=scheme,
        calibration=str(text_file), num_calibration_samples=2, max_seq_length=32, precision="float32", settings=settings,
    )  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", [INT8_ROW, INT4_ROW, INT4_GROUP], ids=lambda f: f.name)
def test_integers_are_odd(format, rule):
    """Q(-x) = -Q(x), ties and the largest too: -2^(n-1), which openPangu's -max|x| takes, has no opposite and stays unused."""
    x, largest = normal(6, 160), format.element.max
    x[0, :32] = torch.linspace(-largest, 0, 32).round() + 0.5  # under absmax the scale is 1 and all of these are ties
    x[0, 32:] = -largest
    x[1, 0], x[2, 0] = -5, 5
    plus, minus = (AbsMax(format=format, rule=rule).quantize(sign * x) for sign in (1, -1))
    codes, opposite = (format.element.decode(q.codes) for q in (plus, minus))
    assert torch.equal(plus.scales, minus.scales)
    assert torch.equal(codes, -opposite)
    assert codes[1, 0] == -largest
    assert opposite[1, 0] == codes[2, 0] == codes.max() == largest


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [INT8_ROW, INT4_ROW], ids=lambda f: f.name)
def test_rows_multiplied_are_rows_of_the_product_multiplied(weights, rule):
    """Of X and of W, whatever the other rows hold: the codes stay, and the factors are those of the scales."""
    x, w = normal(5, 192), normal(7, 192, seed=1)
    tokens = torch.tensor([1.0, 3.7, 1e-4, 2.0**-9, 613.0])
    channels = torch.tensor([0.3, 1.0, 1e3, 2.0**7, 1.7e-3, 5.0, 0.9])
    quantize = {"x": AbsMax(format=INT8_ROW, rule=rule).quantize, "w": AbsMax(format=weights, rule=rule).quantize}
    before = quantize["x"](x), quantize["w"](w)
    after = quantize["x"](x * tokens[:, None]), quantize["w"](w * channels[:, None])
    for one, two, factors in zip(before, after, (tokens, channels), strict=True):
        assert torch.equal(one.codes, two.codes)
        power = factors.log2() % 1 == 0
        assert torch.equal(one.scales[power] * factors[power, None], two.scales[power])
    expected = reference.integer_product(*before) * torch.outer(tokens, channels)
    torch.testing.assert_close(reference.integer_product(*after), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rule", "beyond", "of_four_bits"), [("absmax", 0.0, 16.0), ("full_range", 0.5, 16.6)])
def test_signal_to_noise_is_the_sheets(rule, beyond, of_four_bits):
    """Decibels on N(0, 1), K = 4096: about 41 for INT8, 38 for a product of two, 16 to 17 for INT4.

    Errors are even over a step s, of mean square s^2 / 12: 12 steps^2 / max^2, with 127 or 7 steps to the largest, or half a step
    more. Two noises in a product add up: 3 dB less.
    """
    x, w = normal(160, 4096), normal(256, 4096, seed=1)

    def decibels(exact, got):
        return 10 * torch.log10(exact.double().square().sum() / (got - exact).double().square().sum()).item()

    def predicted(x, steps):
        return 10 * math.log10(12 * (steps + beyond) ** 2 / x.abs().amax(-1).square().mean().item())

    eight, four = AbsMax(format=INT8_ROW, rule=rule), AbsMax(format=INT4_ROW, rule=rule)
    activations, weights = decibels(x, eight.fake(x)), decibels(w, eight.fake(w))
    assert activations == pytest.approx(41, abs=0.5)
    assert activations == pytest.approx(predicted(x, 127), abs=0.03)
    assert weights == pytest.approx(predicted(w, 127), abs=0.03)
    assert decibels(w, four.fake(w)) == pytest.approx(of_four_bits, abs=0.15)
    assert decibels(w, four.fake(w)) == pytest.approx(predicted(w, 7), abs=0.1)
    product = decibels(x.double() @ w.double().T, reference.integer_product(eight.quantize(x), eight.quantize(w)))
    assert product == pytest.approx(38, abs=0.5)
    assert product == pytest.approx(-10 * math.log10(10 ** (-activations / 10) + 10 ** (-weights / 10)), abs=0.1)


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
    [
        ("soar", r"block scales in E4M3 or E8M0 .* those of int"),
        ("arcquant", "int8 activations a row"),
        ("micromix", "replace W.A8:.* by W4A4"),
    ],
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
