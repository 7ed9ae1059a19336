"""D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs. Yan, Bao, Li et al., 2026. arXiv
2602.02546.

For 2 and 3 bits, weights alone. All linear layers but down are rounded on an asymmetric grid (int2, int3 with their clip search).
With G the activation between gate and up, y = W_down (g * (W_up x)):

    (1)  W_down ~ sum_k r_k B_k diag(c):  signs B_k, r_k per row and group, c per column of the whole width (dual-scale quantizer,
         quantizers.dual); the solver fits a group's r and c when it reaches it, on the weights as updated by then
    (2)  W_up <- diag(c) W_up: scales and offsets of its rows are multiplied, its codes stay; c costs nothing
    (3)  b = mean over tokens of (H - H~), H the post-attention norm's output, H~ the same with q, k, v, o quantized, on the
         same inputs (deviation-aware correction, held to +-10); what reads H~ is calibrated on H~ + b

and before all that the residual stream is rotated by one Hadamard matrix with random signs in each group of 128 channels, folded
into the weights. The solver is GPTAQ, GPTQ or round to nearest; columns in group-aware order.

b becomes a bias of the layers that read H~, their rounded weights times b: norms have none. Since activations stay in floats,
that is the same. (2) rounds the scales to what they are stored in once more.

Differs from the authors' code in: (2), which it only simulates, is done; scales are BF16, theirs FP16; c has a mean of 1 in each
group, so that activations keep their size; the embedding keeps its mean, as in methods.quarot; the group of the rotation is the
largest power of two up to 128 that divides the hidden size; the shift of the final norm is left out: it would be a bias of the
output head. The paper's own equations were not to be had; this follows its released code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.formats.integer import INT2, INT2_G64, INT3, INT3_G64
from microbat.formats.ternary import DUAL2, DUAL2_G64, DUAL3, DUAL3_G64
from microbat.methods.base import BlockData, Corrector, ModelData, Plan, Solver
from microbat.models.base import Site
from microbat.models.rotation import Rotation
from microbat.quantizers.dual import DualScale
from microbat.scheme import Scheme
from microbat.transforms.hadamard import random_hadamard

DUAL: dict[BlockFormat, BlockFormat] = {INT2: DUAL2, INT2_G64: DUAL2_G64, INT3: DUAL3, INT3_G64: DUAL3_G64}
GROUP = 128  # channels that are rotated together
LARGEST = 10.0  # of a shift


@dataclass(frozen=True, kw_only=True)
class D2Quant(Corrector):
    name: ClassVar[str] = "d2quant"
    summary: ClassVar[str] = "for 2 and 3 bits: dual-scale down projections, a bias for what quantized attention shifts"
    default_solver: ClassVar[str] = "gptaq"
    solvers: ClassVar[tuple[str, ...]] = ("gptaq", "gptq", "rtn")

    dual: bool = True  # (1) and (2)
    correct: bool = True  # (3)
    rotate: bool = True  # SmolLM2-135M is the worse for it at two bits (LOG.md)
    rounds: int = 15  # of the dual-scale fit

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"d2quant.rounds={self.rounds} must be at least 1")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*(["gated"] if self.dual else []), *(["normed"] if self.rotate or self.correct else []))

    @property
    def seeded(self) -> bool:
        return self.rotate

    def check(self, scheme: Scheme) -> None:
        if scheme.weight is None or scheme.weight.format not in DUAL:
            found = "16 bits" if scheme.weight is None else scheme.weight.format.name
            raise ValueError(
                f"d2quant is for weights of 2 and 3 bits ({', '.join(format.name for format in DUAL)}), not for {found} "
                f"(scheme {scheme.text}); choose W2A16 or W3A16, or gptq"
            )
        if scheme.activation is not None:
            raise ValueError(
                f"d2quant keeps activations in 16 bits, and scheme {scheme.text} quantizes them to "
                f"{scheme.activation.format.name}; choose W{scheme.weight.format.element.bits}A16, or gptq"
            )

    def check_experts(self) -> None:
        if self.dual or self.correct:
            raise ValueError(
                "d2quant's dual-scale quantizer and its correction are not made for experts: choose gptq, or its rotation alone "
                "(--set dual=false --set correct=false --solver gptq), or leave experts in float with --ignore 're:experts'"
            )

    def rotation(self, model: ModelData) -> Rotation | None:
        if not self.rotate:
            return None
        width = model.checkpoint.width
        block = random_hadamard(min(GROUP, width & -width), torch.Generator().manual_seed(model.seed))
        return Rotation(stream=torch.block_diag(*[block] * (width // len(block))))

    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        for site in (site for site in plan.sites if self.dual and site.site.gated):
            formats = {path: DUAL[quantizer.format] for path, quantizer in site.weights.items()}
            site.weights = {path: DualScale(format=format, rounds=self.rounds) for path, format in formats.items()}
        return plan

    def corrects(self, site: Site) -> bool:
        return self.correct and site.normed

    def shift(self, deviation: Tensor) -> Tensor:
        return deviation.clamp(-LARGEST, LARGEST)
