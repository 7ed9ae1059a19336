"""MicroMix: Efficient Mixed-Precision Quantization with Microscaling Formats for Large Language Models. Liu, Meng, Luo
et al., 2025. arXiv 2508.02343 (ICLR 2026).

Channels go into ascending order of M_j = max over samples of mean |X_j|; the first n4 become MXFP4, the next n6 MXFP6 (E3M2),
the last n8 MXFP8 (E4M3), activations and weights alike. An entry of a token whose largest is M needs no more than n
bits while it is below

    (1)  T(n) = 2^b 2^(n-1) / q_max E,   E = M / 254, the largest error of INT8;   q_max = 6 (n = 4), 28 (n = 6)

where "b is the exponent bias" has been read in three ways, by ``revision``:

========  =========================================  =========  =========
revision  b (n = 4, n = 6)                           T(4) / M   T(6) / M
========  =========================================  =========  =========
iclr      1, 3: the bias itself                      0.01050    0.03600
release   2, 4: the largest exponent                 0.02100    0.07199
fp8       lam 2^-10 448 / 6, lam 2^-6 448 / 28:      0.07292    0.25      (lam = 1; lam = 0 makes all of it MXFP8)
          against FP8's error instead of INT8's
========  =========================================  =========  =========

With p4, p6, p8 the shares of entries below T(4), between, above T(6):

    (2)  n6 = u ceil(K p6 / u),  n8 = u ceil(K p8 / u),  n4 = K - n6 - n8,  u = 128

Reports count scales too, a quarter of a bit more on average than the paper's (4 n4 + 6 n6 + 8 n8) / K.

Only T(4) of ``iclr`` keeps every error below E; the others do for the mean gap of their grid. Weights round to nearest in the
paper; with ``--solver gptq`` columns change format where the groups do, and the statistics are those of mixed activations.

Differs from the authors' code in: magnitudes are compared, where the ICLR branch counts every negative entry as FP4; n6 and n8
are not swapped, as its caller unpacks them; the weights' groups are those of (2), where its main branch keeps all weights
in MXFP4 and smooths; where rounding up would leave n4 below 0, which theirs does not see, it is 0 and n6 gives way: it is
the calibration text that decides, in the midst of a run, and more bits than (2) asks for do no harm. Scales follow the
scheme's rule, in all groups; the one it prefers, ``rceil``, lets no value saturate, as in the kernels; the paper prints
``floor``.
"""

# Shapes: S sequences, L tokens, K width.

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microbat.formats.microscaling import MXFP4, MXFP6_E3M2, MXFP8_E4M3
from microbat.methods.base import BlockData, Plan, Preparer, Solver
from microbat.quantizers.base import AbsMax
from microbat.quantizers.mixed import Mixed
from microbat.scheme import Scheme
from microbat.transforms.permutation import Permutation

FORMATS = (MXFP4, MXFP6_E3M2, MXFP8_E4M3)
BLOCK = 32
Revision = Literal["iclr", "release", "fp8"]


def thresholds(revision: Revision, lam: float = 1.0) -> tuple[float, float]:
    """T(4) / M and T(6) / M of (1)."""
    if revision == "fp8":
        return MXFP8_E4M3.element.max / 6 * 2**-10 * lam, MXFP8_E4M3.element.max / 28 * 2**-6 * lam
    b4, b6 = {"iclr": (1, 3), "release": (2, 4)}[revision]
    return 2**b4 * 2**3 / 6 / 254, 2**b6 * 2**5 / 28 / 254


@dataclass(frozen=True, kw_only=True)
class MicroMix(Preparer):
    name: ClassVar[str] = "micromix"
    summary: ClassVar[str] = "channels by size in MXFP4, MXFP6 and MXFP8, side by side"
    default_solver: ClassVar[str] = "rtn"
    solvers: ClassVar[tuple[str, ...]] = ("rtn", "gptq")
    default_scale_rule: ClassVar[str] = "rceil"

    revision: Revision = "iclr"
    lam: float = 1.0  # revision fp8 alone
    unit: int = 128  # u; a multiple of 32

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ValueError(f"micromix.lam={self.lam} must be from 0 to 1")
        if self.lam != 1 and self.revision != "fp8":
            raise ValueError(f"micromix.lam={self.lam} is for revision=fp8; {self.revision} has no such factor")
        if self.unit < BLOCK or self.unit % BLOCK:
            raise ValueError(f"micromix.unit={self.unit} must be a multiple of the block of {BLOCK}")

    def check(self, scheme: Scheme) -> None:
        roles = (scheme.weight, scheme.activation)
        if any(role is None or role.format != MXFP4 for role in roles):
            named = " and ".join("16 bits" if role is None else role.format.name for role in roles)
            raise ValueError(
                f"micromix mixes MX formats by itself, starting from mxfp4 weights and activations, not from {named}; "
                f"replace {scheme.text} by W4A4"
            )

    def check_width(self, width: int, scheme: Scheme) -> None:
        if width % self.unit:
            fitting = [unit for unit in (96, 64, 32) if unit < self.unit and width % unit == 0]
            way = f"; --set unit={fitting[0]} fits this one" if fitting else ""
            raise ValueError(f"K={width} is not a multiple of micromix.unit={self.unit}{way}")

    @torch.no_grad()
    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        seen = {next(iter(site.weights)): Sizes(thresholds(self.revision, self.lam)) for site in plan.sites}
        data.watch({path: sizes.add for path, sizes in seen.items()})
        for site, sizes in zip(plan.sites, seen.values(), strict=True):
            if not isinstance(site.activation, AbsMax):
                continue
            widths = sizes.groups(self.unit)
            site.transform = Permutation(width=sum(widths), order=sizes.mean.argsort(stable=True))
            groups = [(format, n) for format, n in zip(FORMATS, widths, strict=True) if n]
            parts = tuple(AbsMax(format=format, rule=site.activation.rule) for format, _ in groups)
            site.activation = Mixed(parts=parts, widths=tuple(n for _, n in groups))
            site.weights = dict.fromkeys(site.weights, site.activation)
        return plan


class Sizes:
    """What (2) and the order ask of an activation, over batches of it: ``mean``, M_j [K], and entries above T(4) and T(6)."""

    def __init__(self, limits: tuple[float, float]):
        self.limits = limits
        self.mean = torch.zeros(0)
        self.above, self.seen = [0, 0], 0

    def add(self, x: Tensor) -> None:
        magnitude = x.abs()
        mean = magnitude.mean(-2).amax(0)
        self.mean = mean if not len(self.mean) else torch.maximum(self.mean, mean)
        largest = magnitude.amax(-1, keepdim=True)
        self.above = [
            count + int((magnitude >= limit * largest).sum())
            for count, limit in zip(self.above, self.limits, strict=True)
        ]
        self.seen += magnitude.numel()

    def groups(self, unit: int) -> tuple[int, int, int]:
        """(2): n4, n6, n8."""
        width = len(self.mean)
        six, eight = self.above[0] - self.above[1], self.above[1]
        n8 = min(width, unit * -(-width * eight // (self.seen * unit)))
        n6 = min(width - n8, unit * -(-width * six // (self.seen * unit)))
        return width - n6 - n8, n6, n8
