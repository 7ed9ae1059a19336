"""Experts that run from their bits: a packed layer for each, which multiplies the rows that the router sends there."""

# Shapes: E experts, N out, K in, T tokens, R rows: tokens in the order of their experts.

import torch
from torch import Tensor, nn

from microbat.experts import Routed
from microbat.linear import SiteInput


class PackedExperts(nn.Module):
    """``y = site(x) @ weight[e].T`` for the rows of each expert e, the weight [E, N, K] in its own bits.

    The site's work is done once for all experts. Only experts that got a row are touched.
    """

    def __init__(self, site: SiteInput, experts: list[nn.Module]):
        super().__init__()
        self.site, self.groups = site, nn.ModuleList(experts)
        self.out_features, self.in_features = experts[0].out_features, experts[0].in_features

    def forward(self, x: Tensor, routed: Routed) -> Tensor:
        counts = routed.counts.tolist()
        hit = [expert for expert, count in enumerate(counts) if count]
        rows = routed.each(self.site(x), hit)
        return torch.cat([self.groups[expert](own) for expert, own in zip(hit, rows, strict=True)]).to(x.dtype)

    @property
    def backend(self) -> str:
        """The name of the backend that multiplies."""
        return self.groups[0].backend

    def dequantize(self) -> Tensor:
        """The whole weight [E, N, K] in float32, for those who look at it."""
        return torch.stack([expert.dequantize() for expert in self.groups])
