"""SOAR: Scale Optimization for Accurate Reconstruction in NVFP4 Quantization. Bao, Yan, Li et al., 2026. arXiv 2605.12245.

A weight w is stored as codes q, block scales D_i on the grid of their format and one scale a of the tensor. The error

    (1)  L = sum_i e_i^T H_i e_i,   e_i = a D_i q_i - w_i

is quadratic in each factor while the codes are fixed (H_i = I for the paper's own objective), so each has a best value:

    (2)  a*   = sum_i D_i w_i^T H_i q_i / sum_i D_i^2 q_i^T H_i q_i             (closed-form joint scale optimization)
    (3)  D_i* = w_i^T H_i q_i / (a q_i^T H_i q_i),  real, not yet on the grid
    (4)  (q_i, D_i) = argmin over D in {D_i* rounded down, rounded up}, b in {0.5, 0.51 ... 1.5} of (1),
         q_i = round(w_i / (a b D))                                             (decoupled scale search)

in rounds, until a round gains less than a thousandth. Here a block keeps what it has where (4) finds nothing better, and (2)
is taken only where it lowers (1), so that no round makes it worse: by itself the paper's rule is not monotone. Where more than
a hundredth of the block scales are the largest that there is, they are halved and a doubled, which changes no weight.

*Decoupling.* For H_i = I, or any diagonal, (1) is a sum over weights, the best code of each is the nearest one under
a D, and b = 1 is best: the grid of b cannot help (NVIDIA's ModelOpt found the same, PR 1881; the tests hold it). So it is
searched only with ``metric=hessian``, where H_i are the diagonal blocks of the input's second moments and codes of a
block help each other.

*Sweep.* ``search=sweep`` takes for (4) all 126 values that an E4M3 scale has. Few of them need looking at. With s a scale
that reaches the block's largest magnitude M (6 s >= M): every value of the grid of 2 s within 6 s lies on that of s, so 2 s is
never better; and t below s leaves M alone (M - 6 t)^2 away, more than all that the others can gain where 6 t < 0.29 M.
What remains are 25 values around M / 6 (for E8M0, three), which is all that is computed; the tests compare with all.
It beats the paper's two neighbours by a tenth of the error.

*GPTQ.* ``rounding=gptq`` rounds columns with error feedback under the tensor scale found. A block's own scale is searched
when its turn comes, on its weights as updated by then, with H_i = diag(1 / U_jj^2), what errors in its columns cost after
all later columns have made up for them (U: methods.gptq): a third of the error of GPTQ's own largest-magnitude scale where
channels differ much (LOG.md). ``gptq-fixed`` keeps the scales found on the original weight, which saturate what feedback adds
to it. Rounding is separable in both, so b has no part. At the end (2) once more with the whole H.

The projections that read one activation share a (``Solver.solve_site``), with the sums of (2) over all of them. Formats
without a tensor scale (MXFP4) have a = 1 and the search alone.

No code of the authors is public. The order within a round, what b multiplies (here the stored candidate) and whether a
belongs to a tensor or a row are open in what is; a blog's (2) with a for D on its right side is a slip.
"""

# Shapes: N out, K in, G blocks along K, B block size, C candidates, J values of b.

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat, QTensor, join_blocks, split_blocks
from microbat.formats.element import E4M3, E8M0
from microbat.methods.base import Quant, Solution, Solver, Statistics
from microbat.methods.gptq import GPTQ, Chosen
from microbat.quantizers.base import AbsMax, Scales
from microbat.quantizers.clip import clipped, rounding
from microbat.quantizers.kernel import block_scale, round_blocks
from microbat.scheme import Scheme

WINDOW = {E4M3: (-16, 8), E8M0: (-2, 0)}  # steps on the scale's grid around M / max (rounded up for E8M0); see above
CROWDED = 0.01  # of a tensor's block scales may be the largest of their format
SMALLEST_NORMAL = 2.0**-6  # of E4M3
CHUNK = 1 << 19  # weights times candidates that are compared at once: what a core's cache holds


@dataclass(frozen=True, kw_only=True)
class SOAR(Solver):
    name: ClassVar[str] = "soar"
    summary: ClassVar[str] = "joint closed-form scales, and a search over what block scales can be stored as"

    rounds: int = 15
    tolerance: float = 1e-3  # share of the error; a round that gains less is the last
    closed_form: bool = True  # (2) and (3); False: neighbours of the scale as it is, the paper's ablation
    search: Literal["nearest", "neighbours", "sweep"] = "neighbours"  # nearest: D* to the nearest value, without (4)
    metric: Literal["weight", "hessian"] = "weight"
    betas: int = 101  # values of b from 0.5 to 1.5, metric=hessian only
    rounding: Literal["nearest", "gptq", "gptq-fixed"] = "nearest"
    damping: float = 0.01  # of the mean diagonal of H

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"soar.rounds={self.rounds} must be 0 or more")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"soar.tolerance={self.tolerance} must be from 0 to below 1")
        if self.betas < 1 or self.betas % 2 == 0:
            raise ValueError(f"soar.betas={self.betas} must be odd, so that 1 is among them")
        if self.damping <= 0:
            raise ValueError(f"soar.damping={self.damping} must be above 0")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"hessian"} if self.metric == "hessian" or self.rounding != "nearest" else ())

    @property
    def repairs(self) -> bool:  # type: ignore[override]
        return self.rounding != "nearest"

    def check(self, scheme: Scheme) -> None:
        if scheme.weight is not None:
            _check_format(scheme.weight.format)

    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        """``weight`` [N, K]. Never a larger error (1) than round to nearest; with ``rounds=0`` it is round to nearest."""
        inner = rounding(quantizer)
        _check_format(inner.format)
        if statistics is None and self.needs:
            raise ValueError("soar with metric=hessian or error feedback needs the Hessian of the layer's input")
        weight = clipped(quantizer, weight)
        metric = _blocks_of(statistics, inner.format, self.damping) if self.metric == "hessian" else None
        fit = _Fit(weight, inner, inner.scales(weight), metric)
        first, rounds = fit.loss, self._run(fit)
        notes = {"scale_rounds": float(rounds), "scale_gain": 1 - fit.loss / first if first > 0 else 0.0}
        if self.rounding == "nearest":
            return Solution(weight=fit.result(weight.shape[1]), notes=notes)

        def in_turn(number: int, columns: Tensor, cost: Tensor) -> Tensor:
            if self.rounding == "gptq-fixed":
                return fit.block[number]
            own = _Fit(columns, inner, inner.scales_within(columns, fit.outer), (cost / cost.mean())[None])
            self._run(own, joint=False)
            return own.block[0]

        chosen = Chosen(outer=fit.outer, block=in_turn)
        rounded = GPTQ(damping=self.damping).solve_under(chosen, weight, inner, statistics)
        return Solution(weight=_refit(rounded.weight, weight, statistics), notes={**notes, **rounded.notes})

    def _run(self, fit: "_Fit", *, joint: bool = True) -> int:
        """Rounds of (2), where ``joint``, (3) and (4); how many there were."""
        betas = None
        if self.metric == "hessian" and joint:
            betas = torch.linspace(0.5, 1.5, self.betas, device=fit.weight.device)
            betas[self.betas // 2] = 1.0
        for number in range(self.rounds):
            before = fit.loss
            if joint:
                fit.make_room()
            if self.closed_form and joint:
                fit.refit_tensor_scale()
            fit.choose(self._candidates(fit), betas)
            fixed = self.search == "sweep" and not joint  # another round would look at the same
            if fixed or before - fit.loss <= self.tolerance * before:
                return number + 1
        return self.rounds

    def _candidates(self, fit: "_Fit") -> Tensor:
        if self.search == "sweep":
            return fit.window()
        if self.closed_form:
            low, high = fit.around(fit.best_scales())
        else:
            low, high = fit.beside(fit.block)
        if self.search == "neighbours":
            return torch.stack((low, high), dim=-1)
        wanted = fit.best_scales() if self.closed_form else fit.block
        return torch.where(wanted - low <= high - wanted, low, high)[..., None]


def _check_format(format: BlockFormat) -> None:
    if format.scale_element not in WINDOW or format.block is None:
        raise ValueError(
            f"soar searches block scales in E4M3 or E8M0 (nvfp4, mxfp4 and other MX formats), one to a block; those of "
            f"{format.name} are not such. Choose one of those formats, or gptq"
        )


def _blocks_of(statistics: Statistics | None, format: BlockFormat, damping: float) -> Tensor:
    """Diagonal blocks [G, B, B] of the damped H, float32; lanes beyond K have none."""
    assert statistics is not None
    hessian = statistics.hessian.to(torch.float64)
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    block = format.block_of(len(hessian))
    tail = -len(hessian) % block
    hessian = torch.nn.functional.pad(hessian, (0, tail, 0, tail))
    return hessian.unflatten(1, (-1, block)).unflatten(0, (-1, block)).diagonal(dim1=0, dim2=2).permute(2, 0, 1).float()


class _Fit:
    """One weight, its codes and scales as found so far, and the error (1) of each block."""

    def __init__(self, weight: Tensor, quantizer: AbsMax, scales: Scales, metric: Tensor | None = None):
        self.format, self.metric = quantizer.format, metric
        self.weight = split_blocks(weight, self.format.block_of(weight.shape[1])).transpose(0, 1).contiguous()  # GNB
        self.grid = self.format.scale_element.grid.to(weight.device)
        self.grid = self.grid[self.grid > 0]
        self.outer = scales.tensor  # [] or None
        self.block = scales.block.T.contiguous()  # GN
        self.values = round_blocks(self.weight, self.product(self.block), self.format)  # GNB
        self.errors = self.error(self.weight, self.values, self.product(self.block), metric)  # GN

    @property
    def loss(self) -> float:
        return self.errors.sum(dtype=torch.float64).item()

    @property
    def scales(self) -> Scales:
        return Scales(block=self.block.T.contiguous(), tensor=self.outer)

    def result(self, width: int) -> QTensor:
        codes = self.format.element.encode(join_blocks(self.values.transpose(0, 1), width).contiguous())
        return QTensor(format=self.format, codes=codes, scales=self.scales.block, tensor_scale=self.outer)

    def product(self, block: Tensor) -> Tensor:
        return block if self.outer is None else block * self.outer

    @staticmethod
    def error(weight: Tensor, values: Tensor, scale: Tensor, metric: Tensor | None) -> Tensor:
        """(1) for every block: values [G, ..., B] under ``scale`` [G, ...]."""
        error = values * scale[..., None] - weight
        if metric is None:
            return error.square_().sum(-1)
        return (_Fit.weighted(error, metric) * error).sum(-1).clamp_(min=0)

    @staticmethod
    def weighted(x: Tensor, metric: Tensor | None) -> Tensor:
        """H_i x_i for x [G, ..., B]; ``metric`` [G, B, B], [G, B] where H_i is diagonal, None where it is I."""
        if metric is None:
            return x
        if metric.dim() == 2:
            return x * metric.view(len(metric), *(1,) * (x.dim() - 2), -1)
        return torch.bmm(x.flatten(1, -2), metric).view(x.shape)

    def _inner(self) -> tuple[Tensor, Tensor]:
        """w^T H q and q^T H q of every block, [G, N]."""
        mapped = self.weighted(self.values, self.metric)
        return (mapped * self.weight).sum(-1), (mapped * self.values).sum(-1)

    def make_room(self) -> None:
        """Half of every block scale under twice the tensor's, where many are the largest that there is, and where no half is
        rounded but those of blocks that are all zero."""
        if self.outer is None or (self.block == self.grid[-1]).float().mean() <= CROWDED:
            return
        small = self.block < 2 * SMALLEST_NORMAL
        if not self.values[small].any():
            self.block, self.outer = torch.where(small, self.block, self.block / 2), self.outer * 2

    def refit_tensor_scale(self) -> None:
        """(2), where it lowers the error."""
        if self.outer is None:
            return
        cross, energy = self._inner()
        above = (cross * self.block).sum(dtype=torch.float64)
        below = (energy * self.block.square()).sum(dtype=torch.float64)
        if not (above > 0 and below > 0):
            return
        outer = (above / below).to(torch.float32)
        errors = self.error(self.weight, self.values, self.block * outer, self.metric)
        if errors.sum(dtype=torch.float64) < self.errors.sum(dtype=torch.float64):
            self.outer, self.errors = outer, errors

    def best_scales(self) -> Tensor:
        """(3) [G, N]; a block whose codes are all zero keeps its scale."""
        cross, energy = self._inner()
        outer = 1.0 if self.outer is None else self.outer
        return torch.where((energy > 0) & (cross > 0), cross / (energy * outer), self.block)

    def around(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the grid below (or at) and above ``wanted``."""
        low = (torch.searchsorted(self.grid, wanted, right=True) - 1).clamp(0, len(self.grid) - 2)
        return self.grid[low], self.grid[low + 1]

    def beside(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the grid one step from ``block``, which is on it."""
        index = torch.searchsorted(self.grid, block)
        return self.grid[(index - 1).clamp(min=0)], self.grid[(index + 1).clamp(max=len(self.grid) - 1)]

    def window(self) -> Tensor:
        """All values of the grid [G, N, C] of which one is best."""
        rule = "rceil" if self.format.scale_element.is_power_of_two else "absmax"
        largest = block_scale(self.weight, self.weight.abs().amax(-1), self.outer, self.format, rule)
        first, last = WINDOW[self.format.scale_element]
        width = last - first + 1
        start = (torch.searchsorted(self.grid, largest) + first).clamp(0, len(self.grid) - width)
        return self.grid[start[..., None] + torch.arange(width, device=start.device)]

    def choose(self, candidates: Tensor, betas: Tensor | None) -> None:
        """(4): of ``candidates`` [G, N, C], each times ``betas`` [J] for its codes, the best; or what there is, if that is.

        The codes that there are stay a candidate themselves: under another tensor scale, and with a metric that is not
        separable, rounding anew may lose.
        """
        factors = torch.ones(1, device=candidates.device) if betas is None else betas
        groups, num_rows, block = self.weight.shape
        step = max(1, CHUNK // (groups * candidates.shape[-1] * len(factors) * block))
        for start in range(0, num_rows, step):
            rows = slice(start, start + step)
            scale_GNCJ = self.product(candidates[:, rows])[..., None].expand(-1, -1, -1, len(factors)).flatten(2)
            under = scale_GNCJ if betas is None else scale_GNCJ * factors.repeat(candidates.shape[-1])
            weight = self.weight[:, rows, None]
            values = round_blocks(weight, under, self.format)
            errors = self.error(weight, values, scale_GNCJ, self.metric)
            error, best = errors.min(-1)
            better = error < self.errors[:, rows]
            pick = best[..., None]
            chosen = candidates[:, rows].gather(-1, pick // len(factors))[..., 0]
            values = values.gather(-2, pick[..., None].expand(-1, -1, 1, block))[..., 0, :]
            self.block[:, rows] = torch.where(better, chosen, self.block[:, rows])
            self.values[:, rows] = torch.where(better[..., None], values, self.values[:, rows])
            self.errors[:, rows] = torch.where(better, error, self.errors[:, rows])


def _refit(q: QTensor, weight: Tensor, statistics: Statistics | None) -> QTensor:
    """``q`` with (2) under the whole H, where it has a tensor scale and that lowers the error."""
    if q.tensor_scale is None or statistics is None:
        return q
    unit = QTensor(format=q.format, codes=q.codes, scales=q.scales).dequantize()
    mapped = unit @ statistics.hessian.to(torch.float32)
    above, below = ((mapped * other).sum(dtype=torch.float64) for other in (weight, unit))
    if not (above > 0 and below > 0):
        return q
    scale = (above / below).to(torch.float32)
    return QTensor(format=q.format, codes=q.codes, scales=q.scales, tensor_scale=scale)
