"""Noise: what is a difference and what is not."""

import math

import pytest
import torch

from microbat.evaluation.spread import Estimate, estimate, indistinct, overlap

W = 16


def windows(seed: int, scale: float = 1.0) -> list[float]:
    """One group of items."""
    return (scale * torch.randn(W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).tolist()


def shifted(values: list[float], by: float) -> list[float]:
    return [value + by for value in values]


def test_several_runs_have_a_mean_and_a_standard_deviation_one_has_its_own_error():
    assert estimate([1.0, 2.0, 6.0], [0.1, 0.1, 0.1]) == Estimate(value=3.0, error=math.sqrt(7), over="seeds")
    assert estimate([1.5], [0.1]) == Estimate(value=1.5, error=0.1, over="windows")
    assert estimate([1.5], [None], over="items").error is None


def test_a_method_is_not_distinguishable_from_itself():
    assert indistinct([[windows(1)]], [[windows(1)]])


def test_what_windows_have_in_common_cancels():
    hard, one, other = windows(1, scale=100.0), windows(2), shifted(windows(3), 5.0)
    harder = [[a + b for a, b in zip(hard, values, strict=True)] for values in (one, other)]
    assert not indistinct([[one]], [[other]])
    assert not indistinct([[harder[0]]], [[harder[1]]])


@pytest.mark.parametrize(("errors", "same"), [(1.9, True), (2.1, False), (-1.9, True), (-2.1, False)])
def test_the_line_is_at_two_standard_errors_of_the_paired_difference(errors, same):
    one, noise = windows(1), torch.tensor(windows(2), dtype=torch.float64)
    noise = noise - noise.mean()
    difference = noise + errors * noise.std() / math.sqrt(W)
    other = (torch.tensor(one, dtype=torch.float64) + difference).tolist()
    assert indistinct([[one]], [[other]]) is indistinct([[other]], [[one]]) is same


def test_seeds_that_disagree_hide_a_difference():
    base = windows(1)
    other = shifted(base, 0.3)
    assert not indistinct([[base]], [[other]])
    assert not indistinct([[shifted(base, d)] for d in (-0.01, 0.01)], [[other]])
    assert indistinct([[shifted(base, d)] for d in (-0.2, 0.2)], [[other]])


def test_nothing_can_be_told_from_a_single_window():
    assert indistinct([[[1.0]]], [[[9.0]]])
    assert indistinct([[windows(1), [1.0]]], [[windows(1), [9.0]]])


@pytest.mark.parametrize(("errors", "same"), [(1.9, True), (2.1, False)])
def test_the_errors_of_groups_add_up_as_squares(errors, same):
    """Two benchmarks, the second with twice the noise."""
    one = [windows(1), windows(2, scale=2.0)]
    spread = math.hypot(*(torch.tensor(group).std().item() / math.sqrt(W) for group in one))
    centred = [shifted(group, -sum(group) / W) for group in one]
    other = [[0.0] * W, [errors * spread] * W]
    assert indistinct([centred], [other]) is same


def test_estimates_overlap_within_twice_their_errors():
    at = lambda value, error: Estimate(value=value, error=error, over="items")  # noqa: E731
    assert overlap(at(90.0, 3.0), at(99.9, 4.0))
    assert not overlap(at(90.0, 3.0), at(100.1, 4.0))
    assert overlap(at(90.0, None), at(100.0, 0.1))
