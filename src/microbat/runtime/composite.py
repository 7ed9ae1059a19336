"""The linear layer whose weight has several formats side by side: one packed product for each group of columns, summed.

Every backend runs it, since each group is an ordinary :class:`~microbat.runtime.packed.PackedLinear` in its own format. The
site is transformed and quantized once; sums over groups are float32.
"""

# Shapes: K in, N out.

import torch
from torch import Tensor, nn

from microbat.formats.composite import Composite
from microbat.linear import SiteInput, Weight
from microbat.runtime.experts import PackedExperts
from microbat.runtime.packed import PackedLinear


class CompositeLinear(nn.Module):
    """``y = site(x) @ weight.T + bias``, the weight [N, K] in the bits of each of its groups."""

    def __init__(
        self,
        site: SiteInput,
        weight: Composite,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        backend: str = "auto",
    ):
        super().__init__()
        settings = {"dtype": dtype, "device": device, "backend": backend}
        self.site, self.widths = site, weight.widths
        self.out_features, self.in_features = weight.shape
        self.groups = nn.ModuleList(PackedLinear(SiteInput(), part, None, **settings) for part in weight.parts)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.site(x).to(torch.float32).split(self.widths, dim=-1)
        y = sum(group(piece.contiguous()) for group, piece in zip(self.groups, pieces, strict=True))
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    @property
    def backend(self) -> str:
        """The names of the backends that multiply, each once."""
        return ", ".join(sorted({group.backend for group in self.groups}))

    def dequantize(self) -> Tensor:
        """The whole weight [N, K] in float32, for those who look at it."""
        return torch.cat([group.dequantize() for group in self.groups], dim=1)


def packed_linear(
    site: SiteInput,
    weight: Weight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> PackedLinear | CompositeLinear | PackedExperts:
    """The layer that runs from the bits of ``weight`` [N, K] or [E, N, K], whatever it is made of."""
    if len(weight.shape) == 3:
        settings = {"dtype": dtype, "device": device, "backend": backend}
        return PackedExperts(site, [packed_linear(SiteInput(), own, None, **settings) for own in weight.unstack()])
    if isinstance(weight, Composite):
        return CompositeLinear(site, weight, bias, dtype=dtype, device=device, backend=backend)
    return PackedLinear(site, weight, bias, dtype=dtype, device=device, backend=backend)
