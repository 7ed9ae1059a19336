"""Schemes as people write them: formats by width, rules asked for and preferred, requests that mean nothing."""

import pytest

from microbat.recipe import Recipe
from microbat.scheme import Scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W2A16:mxfp4", r"mxfp4 has 4 bits, and no role asks for as many \(of 2 bits there are .*int2_g64, .*ternary"),
        ("W4A8KV16:hif8,int3", r"int3 has 3 bits, .* \(of 4 bits there are .*nvfp4.*; of 8 bits there are "),
        ("W4A2", r"int2 is for weights alone, .* choose 4 bits or more for activations"),
        ("W4A8KV3", r"int3 is for weights alone, .* choose 4 bits or more for the KV cache"),
        ("W5A8", r"no format of 5 bits for weights \(allowed: 2, 3, 4, 6, 8, 16\)"),
        ("4A8", r"scheme '4A8' is not W<bits>A<bits>"),
    ],
)
def test_what_means_nothing_says_what_would(text, message):
    with pytest.raises(ValueError, match=message):
        Scheme.parse(text)


def test_a_rule_that_is_asked_for_must_fit_and_one_that_is_preferred_may():
    mixed = Scheme.parse("W4A8:int4,mxfp8_e4m3", preferred_rule="floor")
    assert [q.rule for q in (mixed.weight, mixed.activation)] == ["absmax", "floor"]
    with pytest.raises(ValueError, match="'floor' does not fit format 'int4'"):
        Scheme.parse("W4A8:int4,mxfp8_e4m3", scale_rule="floor")
    assert Scheme.parse("W4A4", scale_rule="even", preferred_rule="floor").weight.rule == "even"


@pytest.mark.parametrize(("scheme", "rule"), [("W4A4", "floor"), ("W4A4:nvfp4", "absmax"), ("W4A4:hif4", "absmax")])
def test_the_papers_recipe_goes_with_every_format(scheme, rule):
    recipe = Recipe(model="m", method="batquant-paper", scheme=scheme)
    assert recipe.methods()
    assert recipe.parsed_scheme().activation.rule == rule
