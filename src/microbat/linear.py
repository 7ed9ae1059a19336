"""The quantized linear layer: one pair of modules that calibration trains and the runtime runs, so they cannot differ.

``SiteInput`` turns a site's activation into what its linear layers see: transform, clip, quantize; once for all of
them. ``QuantLinear`` multiplies it by a weight on its format's grid.
"""

# Shapes: T tokens, K in, N out.

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microbat import native
from microbat.formats.block import QTensor
from microbat.kv import KVQuantizer
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.transforms.base import BlockDiagonal, Transform


class _Shared:
    """What a site's consumers share, while there are consumers to come. Not attributes of the module: those are slow to set."""

    source: weakref.ref[Tensor] | None = None
    result: Tensor | None = None
    uses = 0


class SiteInput(nn.Module):
    """Transform and quantize the activation that ``num_consumers`` linear layers share.

    The consumers are called one after the other with the same tensor object; the work is done for the first, handed
    to the others, and forgotten after the last.
    """

    def __init__(
        self, transform: Transform | None = None, quantizer: AbsMax | Clip | None = None, *, num_consumers: int = 1
    ):
        super().__init__()
        self.transform = transform
        self.quantizer = quantizer
        self.num_consumers = num_consumers
        self._decided: tuple[object, bool] | None = None
        self._map: native.Map | None = None
        self._shared = _Shared()

    def forward(self, x: Tensor) -> Tensor:
        shared = self._shared
        if shared.source is None or shared.source() is not x:
            shared.source, shared.result, shared.uses = weakref.ref(x), self._compute(x), 0
        result = shared.result
        shared.uses += 1
        if shared.uses >= self.num_consumers:
            shared.source = shared.result = None
        return result

    def _compute(self, x: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        if self._one_pass() and native.available(x) and not needs_gradient and not torch.is_autocast_enabled("cpu"):
            return self._in_one_pass(x)
        if self.transform is not None:
            with torch.autocast(x.device.type, enabled=False):
                x = self.transform(x.to(torch.float32))
        return x if self.quantizer is None else self.quantizer.fake(x)

    def _one_pass(self) -> bool:
        """Whether the native kernel does all of the site; asked once for a quantizer, for every token would take time."""
        if self._decided is None or self._decided[0] is not self.quantizer:
            self._decided = (self.quantizer, _one_pass(self.transform, self.quantizer))
        return self._decided[1]

    def _in_one_pass(self, x: Tensor) -> Tensor:
        if self._map is None and self.transform is not None:
            self._map = native.Map(*self.transform.factors())
        ratios = self.quantizer.ratios if isinstance(self.quantizer, Clip) else None
        out = torch.empty(x.shape, dtype=torch.float32)
        _rounding(self.quantizer).native_fake(x, ratios, out, self._map)
        return out


def _rounding(quantizer: AbsMax | Clip) -> AbsMax:
    return quantizer.inner if isinstance(quantizer, Clip) else quantizer


def _one_pass(transform: Transform | None, quantizer: AbsMax | Clip | None) -> bool:
    """Whether the native kernel can do all of a site at once: a map within blocks, or none, that trains no more; a clip
    within blocks; and no scale of the whole tensor after a map, which nobody knows before it."""
    if quantizer is None or (isinstance(quantizer, Clip) and (quantizer.whole or quantizer.logits is not None)):
        return False
    rounding = _rounding(quantizer)
    if transform is None:
        return native.has_rule(rounding.rule)
    return (
        isinstance(transform, BlockDiagonal)
        and transform.block <= native.LARGEST_MAP
        and not any(parameter.requires_grad for parameter in transform.parameters())
        and native.has_rule(rounding.rule)
        and not rounding.format.has_tensor_scale
    )


class QuantLinear(nn.Module):
    """``y = site(x) @ weight.T + bias`` with ``weight`` [N, K] on the grid of its format."""

    def __init__(self, site: SiteInput, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.site = site
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.site(x).to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class QuantSite:
    """One quantized activation of a block: which linear layers consume it and what happens to it on the way."""

    name: str
    consumers: tuple[str, ...]
    transform: Transform | None
    quantizer: AbsMax | Clip | None


@dataclass(frozen=True, kw_only=True)
class QuantBlock:
    """A quantized transformer block as plain data: its sites, the codes of each linear layer by its path, and what
    quantizes the cache of the module at ``attention`` (None: 16 bits)."""

    sites: tuple[QuantSite, ...]
    weights: dict[str, QTensor]
    kv: KVQuantizer | None = None
    attention: str = "self_attn"


Linear = Callable[[SiteInput, QTensor, Tensor | None], nn.Module]


def dequantized(
    site: SiteInput, weight: QTensor, bias: Tensor | None, *, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    """The layer that calibration runs: its weight as floats."""
    return QuantLinear(site, weight.dequantize().to(dtype), bias)


def install(block: nn.Module, quantized: QuantBlock, linear: Linear = dequantized) -> None:
    """Swap the linear layers of ``block`` that ``quantized`` names for what ``linear`` makes of site, codes and bias, and
    quantize its cache, in place."""
    for site in quantized.sites:
        site_input = SiteInput(site.transform, site.quantizer, num_consumers=len(site.consumers))
        for path in site.consumers:
            bias = getattr(block.get_submodule(path), "bias", None)
            bias = None if bias is None else bias.detach()
            block.set_submodule(path, linear(site_input, quantized.weights[path], bias))
    if quantized.kv is not None:
        block.get_submodule(quantized.attention).kv = quantized.kv
