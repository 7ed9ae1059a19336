"""The activations of one layer, reduced to what the report draws of them.

Shapes: T tokens, K channels, G blocks of a token, B channels of a block (K = G * B); t <= 64 and k <= 192 cells.
The figures follow Figures 2, 5 and 8-11 of BATQuant (arXiv:2603.16590): the surface of |x| over (token, channel), and
the values of chosen blocks after division by their scale, before rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

MAX_TOKENS = 64  # cells of the surface along the tokens
MAX_CHANNELS = 192  # cells of the surface along the channels
MAX_VALUES = 4096  # values kept of each chosen block: plenty for a histogram of some 100 bins
NUM_BLOCKS = 3  # blocks whose values are shown: the most peaked ones and, as in Figure 2, the calmest
DIGITS = 4  # significant digits kept, so that a report stays small


def activation_record(
    layer_name: str,
    x_before: Float[Tensor, "T K"],
    x_after: Float[Tensor, "T K"],
    scale_before: Float[Tensor, "T G"],
    scale_after: Float[Tensor, "T G"],
    grid: Sequence[float],
    block: int,
) -> dict:
    """Plain data of one layer's activations before and after its transform, ready for `report.json`.

    `x_*` are the activations, `scale_*` the scales that the quantizer gives their blocks (multiply to dequantize),
    `grid` the non-negative values of the format's element, `block` the number of channels that share a scale.
    The surface is |x|, reduced by the maximum over cells, so that outliers survive. The chosen blocks are those with
    the largest peak-to-rms ratio before the transform, plus the calmest one; their indices are the same before and
    after. A block whose scale is 0 counts as zeros; what is not finite becomes None. Raises ValueError when the
    shapes do not fit each other.
    """
    for name, x_TK, scale_TG in (("before", x_before, scale_before), ("after", x_after, scale_after)):
        _check(f"layer '{layer_name}': x_{name}", x_TK, scale_TG, block)
    if x_before.shape != x_after.shape:
        raise ValueError(
            f"layer '{layer_name}': x_before is {tuple(x_before.shape)}, x_after is {tuple(x_after.shape)}; "
            "they must be equal"
        )
    chosen = _chosen_blocks(_unflatten(x_before, block))
    return {
        "layer": layer_name,
        "shape": list(x_before.shape),
        "grid": [float(value) for value in grid],
        "before": _side(x_before, scale_before, block, chosen),
        "after": _side(x_after, scale_after, block, chosen),
    }


def bimodality(values: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """The bimodality coefficient (skew^2 + 1) / kurtosis along the last axis, in float64.

    1/3 for a Gaussian, 5/9 for a uniform distribution, 1 for two equal spikes. The kurtosis is the plain one
    (3 for a Gaussian). NaN where all values are equal or one is not finite.
    """
    centred = values.double()
    centred = centred - centred.mean(dim=-1, keepdim=True)
    m2 = centred.square().mean(dim=-1)
    m3 = centred.pow(3).mean(dim=-1)
    m4 = centred.pow(4).mean(dim=-1)
    # skew^2 = m3^2 / m2^3 and kurtosis = m4 / m2^2
    return (m3.square() / m2 + m2.square()) / m4


def _check(what: str, x_TK: Tensor, scale_TG: Tensor, block: int) -> None:
    if block < 1 or x_TK.ndim != 2 or x_TK.numel() == 0:
        raise ValueError(f"{what}: shape {tuple(x_TK.shape)} with block {block}; must be tokens x channels, not empty")
    num_tokens, num_channels = x_TK.shape
    if num_channels % block:
        raise ValueError(f"{what}: K={num_channels} is not a multiple of block {block}")
    if tuple(scale_TG.shape) != (num_tokens, num_channels // block):
        raise ValueError(
            f"{what}: scales are {tuple(scale_TG.shape)}, "
            f"must be {(num_tokens, num_channels // block)} for block {block}"
        )


def _side(x_TK: Tensor, scale_TG: Tensor, block: int, chosen: list[int]) -> dict:
    x_TGB = _unflatten(x_TK, block)
    scale_TG1 = scale_TG.detach().float()[..., None]
    scaled_TGB = torch.where(scale_TG1 == 0, torch.zeros_like(x_TGB), x_TGB / scale_TG1)
    scaled_GN = scaled_TGB.transpose(0, 1).flatten(start_dim=1)
    num_tokens_kept = max(1, MAX_VALUES // block)
    stride = math.ceil(x_TGB.shape[0] / num_tokens_kept)
    return {
        "surface": _plain(_max_pool(x_TK.detach().float().abs())),
        "scaled": [_plain(scaled_TGB[::stride, index].flatten()) for index in chosen],
        "blocks": chosen,
        "bimodality": _plain(bimodality(scaled_GN)),
    }


def _chosen_blocks(x_TGB: Tensor) -> list[int]:
    """Indices of the blocks to show, most peaked first; ties go to the lower index.

    The peak is taken token by token, as each token's block gets its own scale: a massive token does not make a block
    peaked, a channel that towers over its neighbours does.
    """
    peak_TG = x_TGB.abs().amax(dim=-1)
    rms_TG = x_TGB.square().mean(dim=-1).sqrt()
    ratio_G = torch.where(rms_TG == 0, torch.zeros_like(rms_TG), peak_TG / rms_TG).mean(dim=0)
    order = torch.argsort(ratio_G.nan_to_num(nan=math.inf), descending=True, stable=True).tolist()
    return order if len(order) <= NUM_BLOCKS else [*order[: NUM_BLOCKS - 1], order[-1]]


def _max_pool(magnitude_TK: Tensor) -> Tensor:
    """The maximum over disjoint cells of near-equal size, at most MAX_TOKENS x MAX_CHANNELS of them."""
    num_tokens, num_channels = magnitude_TK.shape
    t, k = min(num_tokens, MAX_TOKENS), min(num_channels, MAX_CHANNELS)
    token_cell_T = torch.arange(num_tokens, device=magnitude_TK.device) * t // num_tokens
    channel_cell_K = torch.arange(num_channels, device=magnitude_TK.device) * k // num_channels
    pooled_tK = magnitude_TK.new_zeros(t, num_channels).scatter_reduce(
        0, token_cell_T[:, None].expand(num_tokens, num_channels), magnitude_TK, "amax"
    )
    return magnitude_TK.new_zeros(t, k).scatter_reduce(
        1, channel_cell_K[None, :].expand(t, num_channels), pooled_tK, "amax"
    )


def _unflatten(x_TK: Tensor, block: int) -> Tensor:
    return x_TK.detach().float().unflatten(-1, (-1, block))


def _plain(values: Tensor) -> list:
    """Nested lists of rounded floats; None for what is not finite, which JSON cannot hold."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]
