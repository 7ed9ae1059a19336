"""The activations' record: what is kept of them, and that it is right."""

from __future__ import annotations

import json
import math

import pytest
import torch

from microbat.report import activation_record, bimodality

T, G, B = 150, 14, 16
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.fixture
def x_TK() -> torch.Tensor:
    x_TK = torch.randn(T, G * B, generator=torch.Generator().manual_seed(7))
    x_TK[:, 5 * B + 3] *= 60  # an outlier channel
    x_TK[11, 9 * B + 2] = 500.0  # a single massive value
    return x_TK


def record_of(x_TK: torch.Tensor, **changes) -> dict:
    scale_TG = x_TK.unflatten(-1, (-1, B)).abs().amax(dim=-1) / 6
    inputs = {"x_before": x_TK, "x_after": x_TK, "scale_before": scale_TG, "scale_after": scale_TG}
    return activation_record("model.layers.4.mlp.down_proj", **(inputs | changes), grid=GRID, block=B)


def test_surface_keeps_outliers_and_stays_small(x_TK):
    surface = record_of(x_TK)["before"]["surface"]
    assert (len(surface), len(surface[0])) == (64, 192)
    assert max(map(max, surface)) == 500.0
    token_cell, channel_cell = 11 * 64 // T, (9 * B + 2) * 192 // (G * B)
    assert surface[token_cell][channel_cell] == 500.0
    assert sum(value == 500.0 for row in surface for value in row) == 1  # cells are disjoint


def test_small_surface_is_the_magnitude_itself(x_TK):
    surface = record_of(x_TK[:5, : 2 * B])["before"]["surface"]
    torch.testing.assert_close(torch.tensor(surface), x_TK[:5, : 2 * B].abs(), rtol=1e-3, atol=0)


def test_chosen_blocks_are_the_most_peaked_ones_and_the_calmest(x_TK):
    x_TK[:, 12 * B + 1] *= 8
    x_TK[:, 2 * B : 3 * B] = 1.0
    record = record_of(x_TK)
    assert record["before"]["blocks"] == [5, 12, 2]
    assert record["after"]["blocks"] == [5, 12, 2]


def test_scaled_values_lie_on_the_scale(x_TK):
    scaled = record_of(x_TK)["after"]["scaled"]
    for values in scaled:
        assert len(values) == T * B
        assert max(abs(value) for value in values) == pytest.approx(6)


def test_many_tokens_are_thinned_out():
    x_TK = torch.randn(2000, 2 * B, generator=torch.Generator().manual_seed(1))
    scaled = record_of(x_TK)["before"]["scaled"]
    assert all(2000 < len(values) <= 4096 for values in scaled)


def test_record_is_json_even_with_zero_blocks_and_non_finite_values(x_TK):
    x_TK[:, :B] = 0
    x_TK[3, 4 * B] = math.nan
    x_TK[4, 6 * B] = math.inf
    record = json.loads(json.dumps(record_of(x_TK), allow_nan=False))
    assert record["before"]["bimodality"][0] is None  # all values equal
    assert record["before"]["bimodality"][4] is None
    assert record["shape"] == [T, G * B]


def test_inputs_are_left_alone(x_TK):
    kept = x_TK.clone()
    record_of(x_TK.requires_grad_())
    assert torch.equal(x_TK, kept)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.linspace(-1, 1, 20001, dtype=torch.float64), 5 / 9),
        (torch.tensor([-1.0, 1.0]).repeat(50), 1.0),
        (torch.special.ndtri((torch.arange(100000, dtype=torch.float64) + 0.5) / 100000), 1 / 3),
    ],
    ids=["uniform", "two spikes", "gaussian"],
)
def test_bimodality_of_known_distributions(values, expected):
    assert bimodality(values).item() == pytest.approx(expected, rel=1e-3)
    assert bimodality(5 - 3 * values).item() == pytest.approx(expected, rel=1e-3)


def test_hadamard_makes_an_outlier_block_bimodal(x_TK):
    hadamard = torch.ones(1, 1)
    while len(hadamard) < B:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    after_TK = (x_TK.unflatten(-1, (-1, B)) @ hadamard).flatten(-2)
    scale_TG = after_TK.unflatten(-1, (-1, B)).abs().amax(dim=-1) / 6
    record = record_of(x_TK, x_after=after_TK, scale_after=scale_TG)
    assert record["after"]["bimodality"][5] > 5 / 9
    assert record["after"]["bimodality"][0] < 5 / 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_after": torch.ones(T, 3 * B), "scale_after": torch.ones(T, 3)}, "must be equal"),
        ({"x_after": torch.ones(T, 3 * B + 1)}, "K=49 is not a multiple of block 16"),
        ({"scale_before": torch.ones(T, G + 1)}, r"scales are \(150, 15\), must be \(150, 14\)"),
        ({"x_before": torch.ones(0, G * B)}, "not empty"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x_TK, changes, message):
    with pytest.raises(ValueError, match=rf"model\.layers\.4\.mlp\.down_proj.*{message}"):
        record_of(x_TK, **changes)
