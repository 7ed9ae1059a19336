"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers. Frantar, Ashkboos, Hoefler,
Alistarh, 2022. arXiv 2210.17323. Made aware of block formats.

With H = X^T X + damping and U the upper Cholesky factor of H^-1, columns are rounded from first to last:

    (1)  q_j = round(w_j) under its block's scale;   e_j = (w_j - q_j) / U_jj
    (2)  w_l <- w_l - e_j U_jl   for l > j

Differs from the authors' code in: a block's scales come from its weights as updated so far, never from stale ones
(sheet B3, T6), those inside a block too (HiF4's flags), and then stay for all of its columns; saturated values stay in the
error; H and its factor are float64; a singular H is never replaced: the damping is raised tenfold until the factor exists,
and what it took is recorded; the columns of one format block are rounded in a row and everything to their right is updated by
one product. On a GPU a Triton kernel rounds 128 columns in one launch (``kernels.gptq``), of formats that it knows.

HiFloat's authors and AMCT round a HiF4 unit's 64 columns at once and hand on each one's error over U's diagonal. Column by
column under frozen scales, as here, loses less (tests/methods/test_gptq.py).
"""

# Shapes: N out, K in, B block size.

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microbat import kernels
from microbat.formats.block import QTensor
from microbat.formats.composite import Composite
from microbat.methods.base import Quant, Solution, Solver, Statistics
from microbat.quantizers.base import AbsMax, Scales
from microbat.quantizers.clip import Clip
from microbat.quantizers.kernel import round_lanes
from microbat.quantizers.mixed import Mixed

DAMPING_TRIES = 6
LAZY_COLUMNS = 32  # columns rounded before the rest is updated, where the format has no blocks of its own


@dataclass(frozen=True, kw_only=True)
class GPTQ(Solver):
    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "error feedback from column to column by the input's Hessian"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = 0.01  # of the mean diagonal of H; the authors' percdamp

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise ValueError(f"gptq.damping={self.damping} must be above 0")

    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        """``weight`` [N, K] and H [K, K]. A column whose input is always zero is stored as zero."""
        return self.solve_under(None, weight, quantizer, statistics)

    def solve_under(
        self, chosen: "Chosen | None", weight: Tensor, quantizer: Quant, statistics: Statistics | None
    ) -> Solution:
        """:meth:`solve` under scales that somebody else chooses; None: by the quantizer's rule."""
        if statistics is None:
            raise ValueError("gptq needs the Hessian of the layer's input")
        inner = quantizer.inner if isinstance(quantizer, Clip) else quantizer
        weight = quantizer.clip(weight) if isinstance(quantizer, Clip) else weight.to(torch.float32)
        hessian = statistics.hessian.to(torch.float64)
        dead = hessian.diagonal() == 0
        factor, damping = inverse_cholesky(hessian, self.damping, dead)
        weight, factor = weight.masked_fill(dead, 0.0), factor.to(torch.float32)
        rounded: QTensor | Composite
        if isinstance(inner, Mixed):
            rounded = _round_groups(weight, factor, inner)
        else:
            rounded = _round_columns(weight, factor, inner, chosen)
        return Solution(weight=rounded, notes={"damping": damping, "dead_columns": float(dead.sum())})


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Scales that are not the quantizer's: of the tensor, ``outer`` [] or None, and of a block of columns when its turn comes.

    ``block(start, columns, cost)`` gives [N] for the block from column ``start`` on: ``columns`` [N, B] are its weights as
    updated so far, ``cost`` [B] = 1 / U_jj^2 what a squared error in each adds to the layer's, the columns after it making up
    for what they can.
    """

    outer: Tensor | None
    block: Callable[[int, Tensor, Tensor], Tensor]


def inverse_cholesky(hessian: Tensor, damping: float, dead: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the damped inverse Hessian, float64 [K, K], and the damping that it took."""
    mean = hessian.diagonal().mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        raise ValueError(
            "the Hessian is not finite or is zero: the layer's calibration inputs hold NaN, Inf or nothing"
        )
    for attempt in range(DAMPING_TRIES):
        tried = damping * 10**attempt
        damped = hessian + torch.diag(torch.where(dead, mean, tried * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, tried
    raise ValueError(f"the Hessian stays singular with damping raised to {tried:g} of its mean diagonal")


def _round_groups(weight: Tensor, factor: Tensor, quantizer: Mixed) -> Composite:
    """Groups of columns in formats of their own, from first to last: what one leaves flows to all after it."""
    parts, start = [], 0
    for inner, group in quantizer.split(weight):
        stop = start + group.shape[1]
        own = factor[start:stop, start:stop]
        parts.append(_round_columns(weight[:, start:stop], own, inner))
        # The errors e of (1) solve e U = w - q within the group; (2) carries them on.
        left = weight[:, start:stop] - parts[-1].dequantize()
        errors = torch.linalg.solve_triangular(own, left, upper=True, left=False)
        weight = torch.cat([weight[:, :stop], weight[:, stop:] - errors @ factor[start:stop, stop:]], dim=1)
        start = stop
    return Composite(parts=tuple(parts))


def _round_columns(weight: Tensor, factor: Tensor, quantizer: AbsMax, chosen: Chosen | None = None) -> QTensor:
    """The column loop; scales of a block are taken when its turn comes, from the weights as updated by then.

    Columns are laid out one after the other, [K, N], so that each step reads and writes a run of memory.
    """
    columns, format = weight.shape[1], quantizer.format
    block = format.block_of(columns)
    # A scale of the whole tensor, or of a whole row, is fixed before the loop; block scales are replaced in turn.
    scales = quantizer.scales(weight)
    if chosen is None and kernels.runs_on(weight.device.type) and kernels.knows(format, quantizer.rule):
        from microbat.kernels.gptq import round_columns

        fixed = {"outer": scales.tensor, "row_scale": scales.block if format.block is None else None}
        return round_columns(weight, factor, format=format, rule=quantizer.rule, **fixed)
    outer = scales.tensor if chosen is None else chosen.outer
    work_KN = weight.T.contiguous()
    taken, values_KN = [], torch.empty_like(work_KN)
    lazy = block if block < columns else LAZY_COLUMNS
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        if chosen is not None:
            cost = factor.diagonal()[start:stop].square().reciprocal()
            scale = Scales(block=chosen.block(start, work_KN[start:stop].T, cost)[:, None], tensor=outer)
            taken.append(scale)
        elif block < columns:
            scale = quantizer.scales_within(work_KN[start:stop].T, outer)
            taken.append(scale)
        else:
            scale = scales
        scale_N = scale.product[:, 0].contiguous()
        factors_BN = None if scale.inner is None else format.factors(scale.inner)[:, 0].T.contiguous()
        errors = torch.empty_like(work_KN[start:stop])
        for j in range(start, stop):
            factors_N = None if factors_BN is None else factors_BN[j - start]
            values_KN[j] = round_lanes(work_KN[j], scale_N, format, factors_N)
            value_N = values_KN[j] * (scale_N if factors_N is None else scale_N * factors_N)
            torch.div(work_KN[j] - value_N, factor[j, j], out=errors[j - start])
            work_KN[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
        work_KN[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return QTensor(
        format=format,
        codes=format.element.encode(values_KN.T.contiguous()),
        scales=torch.cat([scale.block for scale in taken], dim=1) if taken else scales.block,
        tensor_scale=outer,
        inner=torch.cat([scale.inner for scale in taken], dim=1) if format.inner else None,
    )
