"""PT2-LLM: Post-Training Ternarization for Large Language Models. Yan, Bao, Li et al., 2025. arXiv 2510.03267
(ICLR 2026).

Weights become alpha T + mu, T of -1, 0, 1, with alpha and mu per row and block of 128 columns, a block at a time:

    (1)  iterative ternary fitting: the best alpha, mu for T and the nearest T for alpha, mu, in turns, until T stays
         (quantizers.sums)
    (2)  activation-aware alignment: for that T the alpha, mu with the least error of the block's outputs. With C = X^T X / T of
         the block's channels and t, w a row of T and of the weight
             [t C t^T, 1 C t^T; t C 1^T, 1 C 1^T] [alpha; mu] = [w C t^T; w C 1^T]
    (3)  the block's error E moves to the columns that remain, F: W_F <- W_F - E V_BB^-1 V_BF, V the inverse of the damped H
         on what remains, V_FF <- V_FF - V_FB V_BB^-1 V_BF
    (4)  structural reordering: the next block is the columns, of those that remain, with the largest cosine to their mean
         (order=similarity; the paper's ablation has order=hessian, the largest of diag(H) first, between that and none)

The weights that read one activation are one weight of more rows here: one order, a gather of the activation's channels, serves
them all (the paper orders each by itself).

Differs from the paper in: (2) solves each row's system; its vectorized form (Eq. 13) is not the minimum and does worse than
leaving (2) out. (3) is exact for blocks that are rounded as a whole, where errors over U's diagonal forget what columns of a
block share. alpha and mu are BF16, not FP16, and (3) sees them as stored. No code of the authors is public.
"""

# Shapes: N out (of all weights of a site together), K in, B block size, G blocks.

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.ternary import TRIT
from microbat.methods.base import Quant, Solution, Solver, Statistics
from microbat.methods.gptq import inverse_cholesky
from microbat.quantizers import sums
from microbat.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class PT2LLM(Solver):
    name: ClassVar[str] = "pt2llm"
    summary: ClassVar[str] = "ternary weights with an offset, aligned with activations, like columns in one block"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    align: bool = True  # (2)
    order: Literal["similarity", "hessian", "natural"] = "similarity"  # (4)
    rounds: int = 50  # of (1), at most
    damping: float = 0.01  # of the mean diagonal of H

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"pt2llm.rounds={self.rounds} must be 0 or more")
        if self.damping <= 0:
            raise ValueError(f"pt2llm.damping={self.damping} must be above 0")

    @property
    def reorders(self) -> bool:
        return self.order != "natural"

    def check(self, scheme: Scheme) -> None:
        if scheme.weight is not None and scheme.weight.format.element != TRIT:
            raise ValueError(
                f"pt2llm makes ternary weights, not {scheme.weight.format.name} (scheme {scheme.text}); choose W2A16:ternary, or "
                "W2A16:ternary_g64 where a width is no multiple of 128"
            )

    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        """``weight`` [N, K] and H [K, K]."""
        return self.solve_site({"": weight}, {"": quantizer}, statistics)[""]

    def solve_site(
        self, weights: dict[str, Tensor], quantizers: dict[str, Quant], statistics: Statistics | None
    ) -> dict[str, Solution]:
        if statistics is None:
            raise ValueError("pt2llm needs the Hessian of the layer's input")
        format = next(iter(quantizers.values())).format
        together = torch.cat(list(weights.values()))
        numbers, codes, order, damping = self._ternarize(together, format, statistics.hessian.to(torch.float64))
        sizes = [len(weight) for weight in weights.values()]
        parts = zip(weights, codes.split(sizes), numbers.split(sizes), strict=True)
        return {
            path: Solution(
                weight=QTensor(format=format, codes=c.clone(), scales=n[..., 0].clone(), terms=n[..., 1:].clone()),
                notes={"damping": damping},
                order=order if self.reorders else None,
            )
            for path, c, n in parts
        }

    def _ternarize(self, weight: Tensor, format: BlockFormat, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Numbers [N, G, 2], codes [N, K] with columns in ``order`` [K], and the damping that it took."""
        width, block = weight.shape[1], format.block_of(weight.shape[1])
        dead = hessian.diagonal() == 0
        factor, damping = inverse_cholesky(hessian, self.damping, dead)
        inverse = factor.T @ factor
        metric = hessian + damping * hessian.diagonal().mean() * torch.eye(
            width, dtype=hessian.dtype, device=hessian.device
        )
        left, order = torch.arange(width, device=weight.device), []
        rest = weight.to(torch.float64)
        numbers, codes = [], []
        while len(left):
            chosen = self._next(rest, hessian.diagonal()[left], block)
            others = torch.ones_like(left, dtype=torch.bool)
            others[chosen] = False
            own, channels = rest[:, chosen], left[chosen]
            fitted, code = sums.fit(own[:, None].float(), format, self.rounds)
            fitted = fitted[:, 0].to(torch.float64)
            if self.align:
                fitted = align(own, code[:, 0], fitted, metric[channels][:, channels])
            number, code = positive(fitted, code[:, 0])
            number = sums.stored(number.float(), format)
            error = own - sums.chosen(code, sums.values_of(number, format)).to(torch.float64)
            # V_BB^-1 V_BF, for the weights and for V itself.
            carried = torch.linalg.solve(inverse[chosen][:, chosen], inverse[chosen][:, others])
            rest = rest[:, others] - error @ carried
            inverse = inverse[others][:, others] - inverse[others][:, chosen] @ carried
            left = left[others]
            order.append(channels)
            numbers.append(number)
            codes.append(code)
        return torch.stack(numbers, dim=1), torch.cat(codes, dim=1), torch.cat(order), damping

    def _next(self, weight: Tensor, diagonal: Tensor, block: int) -> Tensor:
        """int64 [B]: which of the columns that remain, ``weight`` [N, F] with ``diagonal`` [F] of H, are the next block."""
        if self.order == "similarity":
            return like_the_mean(weight, block)
        if self.order == "hessian":
            return diagonal.argsort(descending=True, stable=True)[:block]
        return torch.arange(block, device=weight.device)


def like_the_mean(weight: Tensor, block: int) -> Tensor:
    """int64 [B]: (4), the columns of ``weight`` [N, K] with the largest cosine to their mean."""
    mean = weight.mean(1)
    cosine = (mean @ weight) / weight.norm(dim=0).clamp(min=torch.finfo(weight.dtype).tiny)
    return cosine.argsort(descending=True, stable=True)[:block]


def align(weight: Tensor, codes: Tensor, numbers: Tensor, metric: Tensor) -> Tensor:
    """(2): alpha and mu [N, 2] of rows [N, B] with ``codes``; ``metric`` is C [B, B], ``numbers`` [N, 2] those of (1)."""
    trits = codes.to(metric.dtype) - 1
    basis = torch.stack([trits, torch.ones_like(trits)], dim=1)  # [N, 2, B]
    mapped = basis @ metric
    gram, right = mapped @ basis.mT, (mapped @ weight[..., None])[..., 0]
    return sums.settle(gram, right, numbers)


def positive(numbers: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The same values with alpha >= 0: where it is negative, T and alpha change sign."""
    negative = numbers[:, :1] < 0
    return torch.cat([numbers[:, :1].abs(), numbers[:, 1:]], dim=1), torch.where(negative, 2 - codes, codes)
