"""The quantized linear layer: one pair of modules that calibration trains and the runtime runs, so they cannot differ.

``SiteInput`` turns a site's activation into what its linear layers see: transform, clip, quantize; once for all of
them. ``QuantLinear`` multiplies it by a weight on its format's grid.
"""

# Shapes: E experts, T tokens, K in, N out.

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from microbat import kernels, native
from microbat.experts import Routed, linear
from microbat.formats.block import QTensor
from microbat.formats.composite import Composite
from microbat.kv import KVQuantizer
from microbat.quantizers.base import AbsMax, Packed
from microbat.quantizers.clip import Clip, rounding
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import Residual
from microbat.transforms.base import BlockDiagonal, Transform

Activation = AbsMax | Clip | Residual | Mixed
Weight = QTensor | Composite


class _Shared:
    """What a site's consumers share, while there are consumers to come. Not attributes of the module: those are slow to set."""

    source: weakref.ref[Tensor] | None = None
    packed = False
    result: Tensor | Packed | None = None
    uses = 0


class SiteInput(nn.Module):
    """Transform and quantize the activation that ``num_consumers`` linear layers share.

    The consumers are called one after the other with the same tensor object; the work is done for the first, handed
    to the others, and forgotten after the last. ``site(x)`` gives them values, ``site.packed(x)`` codes and scales.
    """

    def __init__(
        self,
        transform: Transform | None = None,
        quantizer: Activation | None = None,
        *,
        num_consumers: int = 1,
    ):
        super().__init__()
        self.transform = transform
        self.quantizer = quantizer
        self.num_consumers = num_consumers
        self._decided: tuple[object, _OnePass] | None = None
        self._map: native.Map | None = None
        self._blocks: Tensor | None = None
        self._shared = _Shared()

    def forward(self, x: Tensor) -> Tensor:
        return self._once(x, packed=False)  # type: ignore[return-value]

    def packed(self, x: Tensor) -> Packed | None:
        """The activation in its own bits, on devices that have the kernel; None where it stays in floats, or the kernel does not
        know its format."""
        inner = self.quantizer.inner if isinstance(self.quantizer, (Clip, Residual)) else self.quantizer
        known = isinstance(inner, AbsMax) and (native if native.available(x) else kernels).knows(
            inner.format, inner.rule
        )
        return None if not known else self._once(x, packed=True)  # type: ignore[return-value]

    def _once(self, x: Tensor, *, packed: bool) -> Tensor | Packed | None:
        shared = self._shared
        if shared.source is None or shared.source() is not x or shared.packed != packed:
            result = self._pack(x) if packed else self._compute(x)
            shared.source, shared.packed, shared.result, shared.uses = weakref.ref(x), packed, result, 0
        result = shared.result
        shared.uses += 1
        if shared.uses >= self.num_consumers:
            shared.source = shared.result = None
        return result

    def _compute(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            one_pass = self._one_pass()
            if one_pass.native and native.available(x) and not torch.is_autocast_enabled("cpu"):
                return self._by_native(x)
            if one_pass.triton and kernels.runs_on(x.device.type):
                return rounding(self.quantizer).fake_transformed(x, self._ratios(), self._blocks_on(x.device))
        x = self._transformed(x)
        return x if self.quantizer is None else self.quantizer.fake(x)

    def _pack(self, x: Tensor) -> Packed:
        if native.available(x) and isinstance(self.quantizer, AbsMax | Clip):
            return self._pack_natively(x)
        blocks = self._blocks_on(x.device) if self._one_pass().triton else None
        x = x if blocks is not None else self._transformed(x)
        if isinstance(self.quantizer, Residual):
            return self.quantizer.pack(x)
        if isinstance(self.quantizer, Clip) and self.quantizer.whole:
            return self.quantizer.inner.pack(self.quantizer.clip(x))
        return rounding(self.quantizer).pack(x, self._ratios(), blocks)

    def _pack_natively(self, x: Tensor) -> Packed:
        if self._one_pass().native:
            return rounding(self.quantizer).native_pack(x, self._ratios(), self._native_map())
        x = self._transformed(x).contiguous()
        if isinstance(self.quantizer, Clip) and self.quantizer.whole:
            return self.quantizer.inner.native_pack(self.quantizer.clip(x), None, None)
        return rounding(self.quantizer).native_pack(x, self._ratios(), None)

    def _transformed(self, x: Tensor) -> Tensor:
        if self.transform is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return self.transform(x.to(torch.float32))

    def _one_pass(self) -> "_OnePass":
        """Asked once for a quantizer; for every token it would take time."""
        if self._decided is None or self._decided[0] is not self.quantizer:
            self._decided = (self.quantizer, _OnePass.of(self.transform, self.quantizer))
        return self._decided[1]

    def _by_native(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=torch.float32)
        rounding(self.quantizer).native_fake(x, self._ratios(), out, self._native_map())
        return out

    def _native_map(self) -> native.Map | None:
        if self._map is None and self.transform is not None:
            self._map = native.Map(*self.transform.factors())
        return self._map

    def _ratios(self) -> Tensor | None:
        return self.quantizer.ratios if isinstance(self.quantizer, Clip) else None

    def _blocks_on(self, device: torch.device) -> Tensor:
        if self._blocks is None or self._blocks.device != device:
            self._blocks = self.transform.blocks().detach()
        return self._blocks


@dataclass(frozen=True, kw_only=True)
class _OnePass:
    """Which kernels do all of a site at once: maps within blocks that train no more, clips within blocks.

    The native one does without a map too, and knows no scale of the whole tensor after one; Triton's, without a map, is
    what the quantizer itself runs.
    """

    native: bool
    triton: bool

    @classmethod
    def of(cls, transform: Transform | None, quantizer: Activation | None) -> "_OnePass":
        if not isinstance(quantizer, AbsMax | Clip):
            return cls(native=False, triton=False)
        if isinstance(quantizer, Clip) and (quantizer.whole or quantizer.logits is not None):
            return cls(native=False, triton=False)
        inner = rounding(quantizer)
        known = native.knows(inner.format, inner.rule)
        if transform is None:
            return cls(native=known, triton=False)
        trains = any(parameter.requires_grad for parameter in transform.parameters())
        if not isinstance(transform, BlockDiagonal) or trains:
            return cls(native=False, triton=False)
        return cls(
            native=known and transform.block <= native.LARGEST_MAP and not inner.format.has_tensor_scale,
            triton=kernels.knows(inner.format, inner.rule)
            and kernels.has_map(transform.block)
            and inner.format.block is not None,
        )


class QuantLinear(nn.Module):
    """``y = site(x) @ weight.T + bias`` with ``weight`` [N, K] on the grid of its format, K as wide as what the site gives; of
    experts [E, N, K], each for the rows ``routed`` to it."""

    def __init__(self, site: SiteInput, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.site = site
        self.register_buffer("weight", weight, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, routed: Routed | None = None) -> Tensor:
        return linear(self.site(x).to(self.weight.dtype), self.weight, self.bias, routed).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class QuantSite:
    """One quantized activation of a block: which linear layers consume it and what happens to it on the way."""

    name: str
    consumers: tuple[str, ...]
    transform: Transform | None
    quantizer: Activation | None


@dataclass(frozen=True, kw_only=True)
class QuantBlock:
    """A quantized transformer block as plain data: its sites, the codes of each linear layer by its path, and what
    quantizes the cache of the module at ``attention`` (None: 16 bits). ``biases`` [N], by path, stand for what the float layer
    has, which may be none."""

    sites: tuple[QuantSite, ...]
    weights: dict[str, Weight]
    kv: KVQuantizer | None = None
    attention: str = "self_attn"
    biases: dict[str, Tensor] = field(default_factory=dict)

    def thawed(self) -> "QuantBlock":
        """The same block, its clips learning on; transforms are shared with it."""
        sites = tuple(replace(site, quantizer=_thawed(site.quantizer)) for site in self.sites)
        kv = self.kv and KVQuantizer(_thawed(self.kv.key), _thawed(self.kv.value), self.kv.transform)
        return replace(self, sites=sites, kv=kv)

    @property
    def transforms(self) -> list[Transform]:
        """Those of its activations, and of its cache."""
        own = [*(site.transform for site in self.sites), self.kv and self.kv.transform]
        return [transform for transform in own if transform is not None]

    @property
    def quantizers(self) -> list[Activation]:
        """Those of its activations, and of its cache."""
        own = [*(site.quantizer for site in self.sites), *((self.kv.key, self.kv.value) if self.kv else ())]
        return [quantizer for quantizer in own if quantizer is not None]

    def shape(self, path: str) -> tuple[int, ...]:
        """[N, K] or [E, N, K] of the linear layer at ``path``: of its codes without the copies that meet residual channels."""
        *rows, columns = self.weights[path].shape
        quantizers = (site.quantizer for site in self.sites if path in site.consumers)
        return *rows, columns - sum(q.channels for q in quantizers if isinstance(q, Residual))


def _thawed(quantizer: Activation | None) -> Activation | None:
    return quantizer.thaw() if isinstance(quantizer, Clip) else quantizer


Linear = Callable[[SiteInput, Weight, Tensor | None], nn.Module]


def dequantized(
    site: SiteInput, weight: Weight, bias: Tensor | None, *, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    """The layer that calibration runs: its weight as floats."""
    return QuantLinear(site, weight.dequantize().to(dtype), bias)


def install(block: nn.Module, quantized: QuantBlock, make: Linear = dequantized) -> None:
    """Swap the linear layers of ``block`` that ``quantized`` names for what ``make`` makes of site, codes and bias, and
    quantize its cache, in place."""
    for site in quantized.sites:
        site_input = SiteInput(site.transform, site.quantizer, num_consumers=len(site.consumers))
        for path in site.consumers:
            bias = quantized.biases.get(path, getattr(block.get_submodule(path), "bias", None))
            bias = None if bias is None else bias.detach()
            block.set_submodule(path, make(site_input, quantized.weights[path], bias))
    if quantized.kv is not None:
        block.get_submodule(quantized.attention).kv = quantized.kv
