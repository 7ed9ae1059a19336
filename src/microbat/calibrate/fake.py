"""A transformer block that quantizes while it trains: its linear layers swapped for differentiable ones, for a while."""

# Shapes: S sequences, L tokens, K in, N out.

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from microbat.experts import Routed, linear
from microbat.linear import QuantLinear, SiteInput
from microbat.methods.base import Plan, Quant
from microbat.quantizers.residual import facing
from microbat.transforms.base import Transform


class FakeLinear(nn.Module):
    """A linear layer, or experts, that transforms, clips and quantizes its float weight at every call."""

    def __init__(self, site: SiteInput, weight: Tensor, bias: Tensor | None, quantizer: Quant):
        super().__init__()
        self.site, self.quantizer = site, quantizer
        self.float_weight = weight
        self.bias = bias

    def forward(self, x: Tensor, routed: Routed | None = None) -> Tensor:
        x = self.site(x)
        with torch.autocast(x.device.type, enabled=False):
            weight = transformed(self.float_weight, self.site.transform)
        weight = facing(self.site.quantizer, self.quantizer.fake(weight))
        return linear(x, weight, self.bias, routed)


class Scaled(nn.Module):
    """A module whose output's channels are multiplied by ``scale`` [K]."""

    def __init__(self, module: nn.Module, scale: Tensor):
        super().__init__()
        self.module, self.scale = module, scale

    def forward(self, *inputs: Any) -> Tensor:
        return self.module(*inputs) * self.scale


class Unscaled(nn.Module):
    """A module that reads an activation whose channels were multiplied by ``scale`` [K], and stays as it was."""

    def __init__(self, module: nn.Module, scale: Tensor):
        super().__init__()
        self.module, self.scale = module, scale

    def forward(self, x: Tensor) -> Any:
        return self.module(x / self.scale)


def transformed(weight: Tensor, transform: Transform | None) -> Tensor:
    """``weight`` [..., K] in the basis of the transformed activation."""
    return weight if transform is None else transform.inverse_t(weight)


@contextlib.contextmanager
def faked(block: nn.Module, plan: Plan, weights: dict[str, Tensor], rounded: bool = False) -> Iterator[nn.Module]:
    """``block`` with the linear layers of ``plan`` swapped for :class:`FakeLinear`, or for :class:`QuantLinear` where the
    weights are ``rounded``; put back at the end."""
    originals = {path: block.get_submodule(path) for site in plan.sites for path in site.weights}
    biases = {path: linear.bias for path, linear in originals.items()}
    weights, biases = plan.folded(weights, biases)
    for site in plan.sites:
        site_input = SiteInput(site.transform, site.activation, num_consumers=len(site.weights))
        for path, quantizer in site.weights.items():
            if rounded:
                layer = QuantLinear(site_input, weights[path], biases[path])
            else:
                layer = FakeLinear(site_input, weights[path], biases[path], quantizer)
            block.set_submodule(path, layer)
    for site in plan.sites:
        producer = site.site.producer
        if site.scale is not None and producer not in originals:
            originals[producer] = block.get_submodule(producer)
            block.set_submodule(producer, Scaled(originals[producer], site.scale))
        for reader in site.site.readers if site.scale is not None else ():
            originals[reader] = block.get_submodule(reader)
            block.set_submodule(reader, Unscaled(originals[reader], site.scale))
    attention = block.get_submodule(plan.attention)
    attention.kv = plan.kv
    try:
        yield block
    finally:
        del attention.kv
        for path, module in originals.items():
            block.set_submodule(path, module)
