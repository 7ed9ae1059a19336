"""Learned rounding: weights move a little while a preparer trains, then round to nearest.

The straight-through estimator carries the block loss through the rounding to the weights (as in AdaRound, arXiv
2004.10568, and BRECQ, arXiv 2102.05426, with the weight itself as the rounding variable instead of a relaxed bit; Adam
instead of AutoRound's signed steps). A weight that crosses a midpoint changes its code; the others stay. The result is
a plain set of codes: nothing is added at run time.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microbat.methods.base import Quant, Solution, Solver, Statistics


@dataclass(frozen=True, kw_only=True)
class Learned(Solver):
    name: ClassVar[str] = "learned"
    summary: ClassVar[str] = "weights trained along with the transforms, then rounded to nearest"
    takes_stacks: ClassVar[bool] = True

    lr: float = 5e-3  # AdamW, in units of each weight's root mean square; LOG.md has the sweep

    @property
    def weight_lr(self) -> float:  # type: ignore[override]
        return self.lr

    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        return Solution(weight=quantizer.quantize(weight))
