"""SmoothQuant: the factors of its equation, and that smoothing helps where one channel dwarfs the others."""

import torch
from tests.methods.test_batquant import quantize

from microbat.methods.learn import smoothing
from microbat.methods.smoothquant import SmoothQuant


def test_factors_of_the_equation():
    x, w = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([4.0, 1.0, 1.0])
    torch.testing.assert_close(1 / smoothing(x, w, 0.5), torch.tensor([2.0, 1.0, 1e-5**0.5]))
    torch.testing.assert_close(1 / smoothing(x, w, 1.0), torch.tensor([16.0, 1.0, 1e-5]))


def test_smoothing_lowers_the_error_of_integers(tiny):
    """The tiny models' norms have outlier channels, for which the method was made: int8 activations, one scale a token."""
    _, plain = quantize(tiny(), (), scheme="W8A8:int8", rule="")
    _, smooth = quantize(tiny(), (SmoothQuant(alpha=0.5),), scheme="W8A8:int8", rule="")
    assert smooth[0].error < plain[0].error


def test_the_chosen_alpha_is_no_worse_than_a_poor_one(tiny):
    errors = {alpha: quantize(tiny(), (SmoothQuant(alpha=alpha),))[1][0].error for alpha in (0.5, 0.6, 0.7, 0.8, 0.85)}
    _, chosen = quantize(tiny(), (SmoothQuant(),))
    assert chosen[0].error < max(errors.values())
