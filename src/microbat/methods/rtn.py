"""Round to nearest: each weight to the closest code under its block's scale."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microbat.methods.base import Quant, Solution, Solver, Statistics


@dataclass(frozen=True, kw_only=True)
class RTN(Solver):
    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest"
    takes_stacks: ClassVar[bool] = True

    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        return Solution(weight=quantizer.quantize(weight))
