"""D2Quant's dual-scale quantizer: sums of signs per row and group, times a factor per column that all rows share.

W ~ (r0 B0 + r1 B1 ...) diag(c). The factors [K] leave the weight for what produces the activation (``QTensor.columns``), so
that what is stored and run is the plain format.
"""

# Shapes: N rows, K columns, G groups along K, B group size.

from dataclasses import dataclass

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat, QTensor, split_blocks
from microbat.quantizers import sums
from microbat.quantizers.base import Quantizer, Scales, nearest_codes


@dataclass(frozen=True, kw_only=True)
class DualScale(Quantizer):
    """``format`` is one of signs (dual2, dual3); ``rounds`` of rows, columns, codes. Each group's factors have a mean of 1, so
    that activations keep their size when they take them."""

    format: BlockFormat
    rounds: int = 15

    def scales(self, x: Tensor) -> Scales:
        """Scales of a weight [N, K], and its columns' factors [K]; ValueError where K is not a multiple of the group."""
        block = self.format.block_of(x.shape[-1])
        if x.shape[-1] % block:
            raise ValueError(f"K={x.shape[-1]} is not a multiple of {self.format.name}'s block of {block}")
        x_NGB = split_blocks(x.to(torch.float32), block)
        numbers, _, columns_GB = sums.fit_columns(x_NGB, self.format, self.rounds)
        mean_G = columns_GB.mean(-1)
        columns_GB = columns_GB / mean_G[:, None]
        return Scales.of_numbers(sums.stored(numbers * mean_G[:, None], self.format), columns_GB.flatten())

    def scales_within(self, x: Tensor, outer: Tensor | None) -> Scales:
        """Scales of some groups of a weight; groups know nothing of each other."""
        return self.scales(x)

    def quantize(self, x: Tensor) -> QTensor:
        return nearest_codes(x, self.scales(x), self.format)

    def fake(self, x: Tensor) -> Tensor:
        return self.quantize(x).dequantize()
