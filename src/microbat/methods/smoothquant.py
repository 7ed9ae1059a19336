"""SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models. Xiao, Lin, Seznec, Wu,
Demouth, Han, 2022. arXiv 2211.10438.

    s_j = max_t |X_tj|^alpha / max_n |W_nj|^(1 - alpha);   X <- X / s,  W <- W s

for the pairs whose factor folds into a norm: q, k, v and gate, up, each pair with the maxima over all its weights. The
paper gives alpha by model (0.5 to 0.85) and the comparison of BATQuant none; here each block takes the best of those by
the error of its output (sheet B2), unless one is given. o and down are left alone, as in the authors' code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from microbat.methods.base import BlockData, Plan, Preparer, Solver
from microbat.methods.learn import block_loss, channel_maxima, smoothing

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.85)
JUDGED_SEQUENCES = 8  # of the calibration set, for the choice of alpha


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Preparer):
    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = "a factor per channel moves outliers from activations to weights"
    needs: ClassVar[tuple[str, ...]] = ("normed",)

    alpha: float | None = None  # None: the best of 0.5, 0.6, 0.7, 0.8, 0.85, block by block

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"{self.name}.alpha={self.alpha} must be from 0 to 1, or left out for a choice by block")

    @torch.no_grad()
    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        sites, pairs = [site.site for site in plan.sites if site.site.normed], []
        for site, maxima in zip(sites, channel_maxima(data, sites), strict=True):
            linears = [data.block.get_submodule(path) for path in (*site.consumers, *site.readers)]
            pairs.append((data.block.get_submodule(site.producer), linears, *maxima))

        def scale(alpha: float, sign: int) -> None:
            for norm, linears, x, w in pairs:
                fold(norm, linears, smoothing(x, w, alpha) ** -sign)

        def error(alpha: float) -> float:
            scale(alpha, 1)
            weights = {path: data.block.get_submodule(path).weight for site in plan.sites for path in site.weights}
            rows = torch.arange(min(JUDGED_SEQUENCES, len(data.inputs)))
            inputs, source, target = (t[rows] for t in (data.inputs, data.float_inputs, data.targets))
            loss = block_loss(data.faked(plan, weights)(inputs, rows), target, source, inputs, "relative")
            scale(alpha, -1)
            return loss.item()

        scale(min(ALPHAS, key=error) if self.alpha is None else self.alpha, 1)
        return plan


def fold(norm: nn.Module, linears: list[nn.Module], scale: Tensor) -> None:
    """Divide the norm's gain, and its bias, and multiply the weights' columns by ``scale`` [K]: the function stays."""
    for name, parameter in list(norm.named_parameters()):
        setattr(norm, name, nn.Parameter(parameter / scale, requires_grad=False))
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight * scale, requires_grad=False)
