"""GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration. Li, Yin, Lee, Xiao, Panda, 2025. arXiv
2504.02692.

GPTQ asks a layer's rounded weight to do on its quantized inputs X what the weight does on them; here it is to do what the
weight does on the float model's inputs X'. With U the upper Cholesky factor of the damped inverse H^-1 and

    (1)  D = (X' - X)^T X / T,   P = alpha triu(D U^T, 1) U

a column j, before it is rounded, adds w_j P_jl to each column l > j, besides GPTQ's own update (methods.gptq). alpha = 0.25, as
in the authors' code; with few bits more gains little (LOG.md).

Differs from the authors' code in what methods.gptq differs in.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from microbat.methods.base import Quant, Solution, Solver, Statistics
from microbat.methods.gptq import GPTQ, Order, check_order
from microbat.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class GPTAQ(Solver):
    name: ClassVar[str] = "gptaq"
    summary: ClassVar[str] = "GPTQ that also makes up for what the layers before it changed in the input"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "deviation"})
    repairs: ClassVar[bool] = True
    by_row: ClassVar[bool] = True

    alpha: float = 0.25
    damping: float = 0.01  # of the mean diagonal of H
    order: Order = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"gptaq.alpha={self.alpha} must be above 0 and at most 1; without it, it is gptq")
        if self.damping <= 0:
            raise ValueError(f"gptaq.damping={self.damping} must be above 0")

    def check(self, scheme: Scheme) -> None:
        check_order(self.name, self.order, scheme)

    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        """``weight`` [N, K], H and D [K, K]. A column whose input is always zero is stored as zero."""
        solver = GPTQ(damping=self.damping, order=self.order)
        return solver.solve_under(None, weight, quantizer, statistics, asymmetry=self.alpha)
