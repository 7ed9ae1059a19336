"""ARCQuant: Boosting NVFP4 Quantization with Augmented Residual Channels for LLMs. Meng, Luo, Zhao et al., 2026. arXiv
2601.07475.

With a_j = max over tokens of |X_tj|, channels go into ascending order of a_j, so that outliers share blocks, and the last
S of them are quantized twice, Q the block format under the tensor scale of all of X:

    (1)  X~ = [Q(X) | Q(R)],  R = (X - Q(X)) of the last S channels;   W~ = [Q(W) | the same codes of its last S columns]
    (2)  X~ W~^T = Q(X) Q(W)^T + Q(R) Q(W_last)^T,  one product of the stock format over K + S
    (3)  S = 64 ceil(K f / 64), f the share of entries above an eighth of the largest of their token   (the authors' code)
         S = #{j: a_j > max(a) / 8}, rounded up to 64                                                  (the paper)

q, k and v share an order and an S, gate and up another. With scales that are normal E4M3 numbers the error of an entry
that is quantized twice is at most (1.0625 / 6)^2 M < 0.0314 M, M the largest of its block: below MXFP8's 0.0714 M. (The
paper's 1.125^2 / 16 M is looser: a scale rounds to nearest by a sixteenth, not an eighth.) It is void for tokens so small beside
the largest of their batch that a scale is subnormal.

Weights round by any solver over the K original columns, with the statistics of what they meet, X~ with each residual added to
its channel; the paper's is rtn. Other formats with blocks go the same way.

Differs from the authors' code in: f counts magnitudes, where theirs leaves out negative entries; R is what the stored scale
decodes to, where their kernels for Qwen2.5-7B's widths take the scale before it is rounded, which makes the squared error
of what is quantized twice ten times as large; R stays float32, theirs is bfloat16; tensor scales are of max |W|, theirs of
max W; a_j and f come from the same calibration tokens.
"""

# Shapes: S sequences (and residual channels), L tokens, K width.

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from microbat.methods.base import BlockData, Plan, Preparer, Solver
from microbat.quantizers.base import AbsMax
from microbat.quantizers.residual import LANES, Residual, channels_for, common_block
from microbat.scheme import Scheme
from microbat.transforms.permutation import Permutation

STEP = 64  # S is a multiple: of every block size, and of what the authors' products take


@dataclass(frozen=True, kw_only=True)
class ARCQuant(Preparer):
    name: ClassVar[str] = "arcquant"
    summary: ClassVar[str] = "outlier channels quantized twice, their residual appended to the activation"

    rule: Literal["elements", "channels"] = "elements"  # (3): the authors' code, the paper
    threshold: float = 0.125  # 2^-3, three bits of exponent between E5M2 and E2M1
    channels: int | None = None  # S, the same for all; None: by the rule

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"arcquant.threshold={self.threshold} must be between 0 and 1")
        if self.channels is not None and self.channels < 0:
            raise ValueError(f"arcquant.channels={self.channels} must be 0 or more, or left out for the rule")

    def check(self, scheme: Scheme) -> None:
        block = common_block(self.name, scheme.text, scheme.activation, scheme.weight)
        if self.channels is not None and self.channels % block:
            raise ValueError(
                f"arcquant.channels={self.channels} is not a multiple of a block of {block} (scheme {scheme.text})"
            )

    def check_width(self, width: int, scheme: Scheme) -> None:
        if self.channels is not None and self.channels > width:
            raise ValueError(f"arcquant.channels={self.channels} is more than its K={width}; leave it out for the rule")
        if self.channels and (width + self.channels) % LANES:
            block = common_block(self.name, scheme.text, scheme.activation, scheme.weight)
            raise ValueError(
                f"K={width} and arcquant.channels={self.channels} are no multiple of {LANES} together, as products of 4-bit "
                f"tensors take them; --set channels={channels_for(width, self.channels, block)} are one"
            )

    @torch.no_grad()
    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        seen = {next(iter(site.weights)): Outliers(self.threshold) for site in plan.sites}
        data.watch({path: outliers.add for path, outliers in seen.items()})
        for site, outliers in zip(plan.sites, seen.values(), strict=True):
            width = len(outliers.largest)
            site.transform = Permutation(width=width, order=outliers.largest.argsort(stable=True))
            if not isinstance(site.activation, AbsMax):
                continue
            block = site.activation.format.block_of(width)
            channels = (
                channels_for(width, outliers.channels(self.rule), block) if self.channels is None else self.channels
            )
            if channels:
                site.activation = Residual(inner=site.activation, channels=channels)
        return plan


class Outliers:
    """What (3) and the order ask of an activation, over batches of it: ``largest`` [K] and the counts behind f."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.largest = torch.zeros(0)
        self.above = self.seen = 0

    def add(self, x: Tensor) -> None:
        magnitude = x.flatten(0, -2).abs()
        most = magnitude.amax(0)
        self.largest = most if not len(self.largest) else torch.maximum(self.largest, most)
        self.above += int((magnitude > self.threshold * magnitude.amax(-1, keepdim=True)).sum())
        self.seen += magnitude.numel()

    def channels(self, rule: Literal["elements", "channels"]) -> int:
        """(3), not yet held to K."""
        if rule == "channels":
            count = int((self.largest > self.threshold * self.largest.max()).sum())
        else:
            count = -(-len(self.largest) * self.above // self.seen)
        return -(-count // STEP) * STEP
