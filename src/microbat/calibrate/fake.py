"""A transformer block that quantizes while it trains: its linear layers swapped for differentiable ones, for a while."""

# Shapes: S sequences, L tokens, K in, N out.

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from microbat.experts import Routed, linear
from microbat.linear import QuantLinear, SiteInput
from microbat.methods.base import Plan, Rounding, SitePlan, together
from microbat.quantizers.clip import clipped
from microbat.quantizers.residual import facing
from microbat.transforms.base import Transform


class FakeWeights:
    """The float weights that read one activation, transformed anew for every pass through the block; where it ``rounds``, clipped
    and quantized as well, as ``Solver.solve_site`` will: those that share a tensor scale as one. Layers ask one after the other;
    the work is done for the first."""

    def __init__(self, plan: SitePlan, weights: dict[str, Tensor], *, rounds: bool = True):
        self.plan, self.rounds = plan, rounds
        self.weights = {path: weights[path] for path in plan.weights}
        self._made: dict[str, Tensor] = {}

    def __call__(self, path: str) -> Tensor:
        if path not in self._made:
            self._made = self._make()
        return self._made.pop(path)

    def _make(self) -> dict[str, Tensor]:
        quantizers, inner = self.plan.weights, together(self.plan.weights)
        device = next(iter(self.weights.values())).device
        with torch.autocast(device.type, enabled=False):
            mapped = {path: transformed(weight, self.plan.transform) for path, weight in self.weights.items()}
        if not self.rounds:
            return mapped
        if inner is None:
            return {path: quantizers[path].fake(weight) for path, weight in mapped.items()}
        whole = inner.fake(torch.cat([clipped(quantizers[path], weight) for path, weight in mapped.items()], dim=-2))
        return dict(zip(mapped, whole.split([weight.shape[-2] for weight in mapped.values()], dim=-2), strict=True))


class FakeLinear(nn.Module):
    """A linear layer, or experts, that asks ``weights`` for its own at every call."""

    def __init__(self, site: SiteInput, weights: FakeWeights, path: str, bias: Tensor | None):
        super().__init__()
        self.site, self.weights, self.path = site, weights, path
        self.bias = bias

    def forward(self, x: Tensor, routed: Routed | None = None) -> Tensor:
        x = self.site(x)
        return linear(x, facing(self.site.quantizer, self.weights(self.path)), self.bias, routed)


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
def faked(block: nn.Module, plan: Plan, weights: dict[str, Tensor], rounding: Rounding = "fake") -> Iterator[nn.Module]:
    """``block`` with the linear layers of ``plan`` swapped for :class:`FakeLinear`, or for :class:`QuantLinear` where the
    ``rounding`` of the weights is done; put back at the end."""
    originals = {path: block.get_submodule(path) for site in plan.sites for path in site.weights}
    biases = {path: linear.bias for path, linear in originals.items()}
    weights, biases = plan.folded(weights, biases)
    for site in plan.sites:
        site_input = SiteInput(site.transform, site.activation, num_consumers=len(site.weights))
        own = None if rounding == "done" else FakeWeights(site, weights, rounds=rounding == "fake")
        for path in site.weights:
            if own is None:
                layer = QuantLinear(site_input, weights[path], biases[path])
            else:
                layer = FakeLinear(site_input, own, path, biases[path])
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
