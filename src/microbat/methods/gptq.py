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

Columns go in the order of diag(H), largest first, inside each group that shares scales, and groups by the largest that they
hold (group-aware reordering, D2Quant's and GPTQModel's): what matters most is rounded while there is most to make up for it, and
groups stay what they were. ``order=natural`` is the paper's; units with scales for parts of them (HiF4) know no other.

HiFloat's authors and AMCT round a HiF4 unit's 64 columns at once and hand on each one's error over U's diagonal. Column by
column under frozen scales, as here, loses less (tests/methods/test_gptq.py).
"""

# Shapes: N out, K in, B block size, G blocks along K.

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microbat import kernels
from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.composite import Composite
from microbat.methods.base import Quant, Solution, Solver, Statistics
from microbat.quantizers import sums
from microbat.quantizers.base import AbsMax, Scales
from microbat.quantizers.clip import clipped, rounding
from microbat.quantizers.dual import DualScale
from microbat.quantizers.kernel import round_lanes
from microbat.quantizers.mixed import Mixed
from microbat.scheme import Scheme

DAMPING_TRIES = 6
Order = Literal["auto", "natural", "group"]  # auto: group where a format's groups have no scales for parts of them
LAZY_COLUMNS = 32  # columns rounded before the rest is updated, where the format has no blocks of its own


@dataclass(frozen=True, kw_only=True)
class GPTQ(Solver):
    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "error feedback from column to column by the input's Hessian"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    repairs: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    damping: float = 0.01  # of the mean diagonal of H; the authors' percdamp
    order: Order = "auto"

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise ValueError(f"gptq.damping={self.damping} must be above 0")

    def check(self, scheme: Scheme) -> None:
        check_order(self.name, self.order, scheme)

    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        """``weight`` [N, K] and H [K, K]. A column whose input is always zero is stored as zero."""
        return self.solve_under(None, weight, quantizer, statistics)

    def solve_under(
        self,
        chosen: "Chosen | None",
        weight: Tensor,
        quantizer: Quant,
        statistics: Statistics | None,
        *,
        asymmetry: float = 0.0,
    ) -> Solution:
        """:meth:`solve` under scales that somebody else chooses; None: by the quantizer's rule. ``asymmetry``: GPTAQ's share of
        the inputs' deviation that weights make up for."""
        if statistics is None:
            raise ValueError("gptq needs the Hessian of the layer's input")
        inner = rounding(quantizer)
        weight = clipped(quantizer, weight)
        hessian = statistics.hessian.to(torch.float64)
        dead = hessian.diagonal() == 0
        weight = weight.masked_fill(dead, 0.0)
        order = None
        if not isinstance(inner, Mixed) and grouped(self.order, inner.format):
            order = group_order(hessian.diagonal(), inner.format.block_of(weight.shape[1]))
            weight, hessian, dead = weight[:, order], hessian[order[:, None], order], dead[order]
        factor, damping = inverse_cholesky(hessian, self.damping, dead)
        drift = None
        if asymmetry:
            drift = deviation(statistics, order) @ factor.T
            drift = (asymmetry * drift.triu(1) @ factor).to(torch.float32)
        factor = factor.to(torch.float32)
        rounded: QTensor | Composite
        if isinstance(inner, Mixed):
            rounded = _round_groups(weight, factor, inner)
        else:
            if chosen is not None and order is not None:
                chosen = chosen.in_order(blocks_of(order, inner.format.block_of(weight.shape[1])).tolist())
            rounded = _round_columns(weight, factor, inner, chosen, drift)
            rounded = rounded if order is None else back(rounded, order)
        return Solution(weight=rounded, notes={"damping": damping, "dead_columns": float(dead.sum())})


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Scales that are not the quantizer's: of the tensor, ``outer`` [] or None, and of a block of columns when its turn comes.

    ``block(number, columns, cost)`` gives [N] for the weight's block of that number: ``columns`` [N, B] are its weights as
    updated so far, ``cost`` [B] = 1 / U_jj^2 what a squared error in each adds to the layer's, the columns after it making up
    for what they can.
    """

    outer: Tensor | None
    block: Callable[[int, Tensor, Tensor], Tensor]

    def in_order(self, numbers: list[int]) -> "Chosen":
        """The same for a weight whose blocks come in another order, ``numbers``."""
        return replace(self, block=lambda place, columns, cost: self.block(numbers[place], columns, cost))


def grouped(order: Order, format: BlockFormat) -> bool:
    """Whether columns are taken in group-aware order."""
    return order == "group" or (order == "auto" and not format.inner)


def check_order(name: str, order: Order, scheme: Scheme) -> None:
    """Raise ValueError where columns of ``scheme``'s weights cannot change places within a group."""
    if order == "group" and scheme.weight is not None and scheme.weight.format.inner:
        raise ValueError(
            f"{name}.order=group moves columns within a group, and {scheme.weight.format.name} has scales for parts of one; "
            "leave it at auto or natural"
        )


def group_order(diagonal: Tensor, block: int) -> Tensor:
    """int64 [K]: groups of ``block`` columns by their largest ``diagonal`` entry, columns of each by their own; largest first."""
    groups = diagonal.unflatten(0, (-1, block))
    within = groups.argsort(dim=1, descending=True, stable=True)
    across = groups.amax(1).argsort(descending=True, stable=True)
    return (within + block * torch.arange(len(groups), device=within.device)[:, None])[across].flatten()


def back(q: QTensor, order: Tensor) -> QTensor:
    """``q``, whose columns are in ``order``, groups whole, with its columns and groups where they were."""
    home, homes = order.argsort(), blocks_of(order, q.format.block_of(q.shape[1])).argsort()
    return replace(
        q,
        codes=q.codes[:, home],
        scales=q.scales[:, homes],
        terms=None if q.terms is None else q.terms[:, homes],
        columns=None if q.columns is None else q.columns[home],
    )


def blocks_of(order: Tensor, block: int) -> Tensor:
    """Which blocks of columns come one after the other in ``order`` [K], int64 [G]."""
    return order[::block] // block


def deviation(statistics: Statistics, order: Tensor | None) -> Tensor:
    """(X_float - X)^T X / T [K, K], float64, its channels in ``order``."""
    if statistics.deviation is None:
        raise ValueError("the solver needs the deviation of the layer's input from the float model's")
    found = statistics.deviation.to(torch.float64)
    return found if order is None else found[order[:, None], order]


def inverse_cholesky(hessian: Tensor, damping: float, dead: Tensor) -> tuple[Tensor, float]:
    """Upper Cholesky factor of the damped inverse Hessian, float64 [K, K], and the damping that it took."""
    mean = hessian.diagonal().mean()
    if not torch.isfinite(hessian).all() or mean <= 0:
        raise ValueError(
            "the Hessian is not finite or is zero: the layer's calibration inputs hold NaN, Inf or nothing"
        )
    # One more K x K for all steps, column by column as LAPACK wants it: at K = 12288 each is 1.2 GB.
    factor, failed = torch.empty_like(hessian).mT, torch.empty((), dtype=torch.int32, device=hessian.device)
    for attempt in range(DAMPING_TRIES):
        tried = damping * 10**attempt
        factor.copy_(hessian).diagonal().add_(torch.where(dead, mean, tried * mean))
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if failed:
            continue
        torch.cholesky_inverse(factor, out=factor)
        torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        if not failed:
            return factor, tried
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


def _round_columns(
    weight: Tensor,
    factor: Tensor,
    quantizer: AbsMax | DualScale,
    chosen: Chosen | None = None,
    drift: Tensor | None = None,
) -> QTensor:
    """The column loop; scales of a block are taken when its turn comes, from the weights as updated by then. ``drift`` [K, K],
    strictly upper: what each column, before it is rounded, adds to those after it.

    Columns are laid out one after the other, [K, N], so that each step reads and writes a run of memory.
    """
    columns, format = weight.shape[1], quantizer.format
    block = format.block_of(columns)
    # A scale of the whole tensor, or of a whole row, is fixed before the loop; block scales are replaced in turn, and those that
    # are fitted not made before.
    scales = Scales(block=weight[:, :0]) if format.terms and block < columns else quantizer.scales(weight)
    plain = chosen is None and drift is None and isinstance(quantizer, AbsMax)
    if plain and kernels.runs_on(weight.device.type) and kernels.knows(format, quantizer.rule):
        from microbat.kernels.gptq import round_columns

        fixed = {"outer": scales.tensor, "row_scale": scales.block if format.block is None else None}
        return round_columns(weight, factor, format=format, rule=quantizer.rule, **fixed)
    outer = scales.tensor if chosen is None else chosen.outer
    work_KN = weight.T.contiguous()
    taken, kept_KN = [], torch.empty_like(work_KN, dtype=torch.uint8 if format.terms else torch.float32)
    lazy = block if block < columns else LAZY_COLUMNS
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        if chosen is not None:
            cost = factor.diagonal()[start:stop].square().reciprocal()
            scale = Scales(block=chosen.block(start // lazy, work_KN[start:stop].T, cost)[:, None], tensor=outer)
            taken.append(scale)
        elif block < columns:
            scale = quantizer.scales_within(work_KN[start:stop].T, outer)
            taken.append(scale)
        else:
            scale = scales
        rounded = _rounded(scale, format)
        errors = torch.empty_like(work_KN[start:stop])
        for j in range(start, stop):
            kept_KN[j], value_N = rounded(work_KN[j], j - start)
            torch.div(work_KN[j] - value_N, factor[j, j], out=errors[j - start])
            work_KN[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - start], alpha=-1)
            if drift is not None:
                work_KN[j + 1 : stop].addr_(drift[j, j + 1 : stop], work_KN[j])
        work_KN[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if drift is not None:
            work_KN[stop:].addmm_(drift[start:stop, stop:].T, work_KN[start:stop])
    kept, taken = kept_KN.T.contiguous(), taken or [scales]
    factors = [scale.columns for scale in taken if scale.columns is not None]
    return QTensor(
        format=format,
        codes=kept if format.terms else format.element.encode(kept),
        scales=torch.cat([scale.block for scale in taken], dim=1),
        tensor_scale=outer,
        inner=torch.cat([scale.inner for scale in taken], dim=1) if format.inner else None,
        terms=torch.cat([scale.terms for scale in taken], dim=1) if format.terms else None,
        columns=torch.cat(factors) if factors else None,
    )


def _rounded(scale: Scales, format: BlockFormat) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """How columns [N] of a block are rounded, each given with its place: to what is kept of it (codes where the format has terms,
    else element values) and to its values."""
    if format.terms:
        return sums.lane(scale.numbers[:, 0], scale.columns, format)
    scale_N = scale.product[:, 0].contiguous()
    factors_BN = None if scale.inner is None else format.factors(scale.inner)[:, 0].T.contiguous()

    def rounded(column: Tensor, place: int) -> tuple[Tensor, Tensor]:
        factors_N = None if factors_BN is None else factors_BN[place]
        element = round_lanes(column, scale_N, format, factors_N)
        return element, element * (scale_N if factors_N is None else scale_N * factors_N)

    return rounded
