"""Quantizers: tensor to :class:`QTensor`, and ``fake``, the same values in float with a straight-through gradient.

Q-law: ``unpack(pack(q.quantize(x))).dequantize() == q.fake(x)``, bit for bit.
"""

# Shapes: K last axis, G groups along K, B block size, S scales inside a block.

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from microbat import native
from microbat.formats.block import BlockFormat, QTensor, join_blocks, split_blocks
from microbat.formats.scales import default_rule, rules_for, sees_tensor
from microbat.quantizers import kernel, sums


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What a tensor is divided by: one value a block [..., G]; for two-level formats one for the tensor []; codes of the scales
    inside each block [..., G, S] where there are any. For formats with terms these [..., G, M]; and perhaps a factor for each
    column [K]."""

    block: Tensor
    tensor: Tensor | None = None
    inner: Tensor | None = None
    terms: Tensor | None = None
    columns: Tensor | None = None

    @property
    def product(self) -> Tensor:
        """One value a block [..., G]: all levels but those inside it."""
        return self.block if self.tensor is None else self.block * self.tensor

    @property
    def numbers(self) -> Tensor:
        """A block's scale and terms side by side [..., G, 1 + M]."""
        assert self.terms is not None
        return torch.cat([self.block[..., None], self.terms], dim=-1)

    @classmethod
    def of_numbers(cls, numbers: Tensor, columns: Tensor | None = None) -> "Scales":
        return cls(block=numbers[..., 0], terms=numbers[..., 1:], columns=columns)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A tensor in its own bits: packed codes [..., bytes] and scales [..., G] in their stored type, and the tensor's scale []."""

    format: BlockFormat
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None


class Quantizer(ABC):
    """Tensor to QTensor, and the same values in float."""

    @abstractmethod
    def quantize(self, x: Tensor) -> QTensor: ...

    @abstractmethod
    def fake(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class AbsMax(Quantizer):
    """Each block's scale from its largest magnitude by ``rule``; round to nearest.

    ``rule`` defaults to the one that serves the format best (:func:`microbat.formats.scales.default_rule`).
    Two steps, so that scales can be fixed before values are rounded. ``stacked``: what it quantizes is a stack [E, N, K], and a
    scale of the whole tensor is one of each [N, K].
    """

    format: BlockFormat
    rule: str = ""
    stacked: bool = False

    def __post_init__(self) -> None:
        if not self.rule:
            object.__setattr__(self, "rule", default_rule(self.format))
        if self.rule not in rules_for(self.format):
            allowed = ", ".join(rules_for(self.format))
            raise ValueError(f"scale rule {self.rule!r} does not fit format {self.format.name!r} (allowed: {allowed})")

    def scales(self, x: Tensor) -> Scales:
        """Scales of ``x`` [..., K]: block scales [..., G]."""
        return self.scales_within(x, self._tensor_scale(x))

    def scales_within(self, x: Tensor, outer: Tensor | None) -> Scales:
        """Scales of ``x`` [..., K], a part of a tensor whose outer scale is given."""
        if self.format.terms:
            return Scales.of_numbers(self._numbers(x.to(torch.float32)))
        x_GB = split_blocks(x.to(torch.float32), self.format.block_of(x.shape[-1]))
        block = kernel.block_scale(x_GB, x_GB.abs().amax(-1), outer, self.format, self.rule)
        scales = Scales(block=block, tensor=outer)
        return replace(scales, inner=kernel.inner_codes(x_GB, scales.product, self.format))

    def encode(self, x: Tensor, scales: Scales) -> QTensor:
        """Codes of ``x`` [..., K] under given scales; values beyond the grid saturate."""
        if self.format.terms:
            return nearest_codes(x, scales, self.format)
        values = self.round(x, scales)
        return QTensor(
            format=self.format,
            codes=self.format.element.encode(values),
            scales=scales.block,
            tensor_scale=scales.tensor,
            inner=scales.inner,
        )

    def round(self, x: Tensor, scales: Scales) -> Tensor:
        """Element values (before they are scaled back) of ``x`` [..., K]."""
        x_GB = split_blocks(x.to(torch.float32), self.format.block_of(x.shape[-1]))
        return join_blocks(kernel.round_blocks(x_GB, scales.product, self.format, scales.inner), x.shape[-1])

    def of_one(self, index: int) -> "AbsMax":
        """The quantizer of tensor ``index`` of the stack."""
        return replace(self, stacked=False)

    @property
    def _one_by_one(self) -> bool:
        """Whether a stack's tensors go through on their own; without scales of whole tensors they are one tensor of more rows."""
        return self.stacked and sees_tensor(self.format, self.rule)

    def quantize(self, x: Tensor) -> QTensor:
        if self._one_by_one:
            return QTensor.stack([self.of_one(index).quantize(tensor) for index, tensor in enumerate(x)])
        return self.encode(x, self.scales(x))

    def fake(
        self, x: Tensor, low: Tensor | None = None, high: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """``quantize(clip(x)).dequantize()`` in one fused pass, differentiable.

        float32; under autocast its dtype, to which a matrix product would round the values anyway. ``low`` and ``high``
        are clip ratios in (0, 1] that broadcast to the blocks [..., G]; None for both means no clipping. ``out``, a
        contiguous tensor of x's shape whose width is a multiple of the block, receives the values, in its own dtype
        and without a gradient: a buffer used again costs a CPU a third of a fresh one.
        """
        width = x.shape[-1]
        if self._one_by_one:
            clips = [()] * len(x) if low is None or high is None else zip(low, high, strict=True)
            return torch.stack([self.of_one(i).fake(x[i], *clip) for i, clip in enumerate(clips)])
        if self.format.terms:  # fitted to the block: there is no gradient, and clips are the caller's to apply
            y = self.quantize(x.detach()).dequantize().to(_matmul_dtype(x.device))
            return y if out is None else out.copy_(y)
        if native.available(x) and native.knows(self.format, self.rule) and not _needs_gradient(x, low, high):
            y = torch.empty(x.shape, dtype=_matmul_dtype(x.device)) if out is None else out
            if native.available(y):
                ratios = None if low is None or high is None else torch.stack((low, high), dim=-1)
                self.native_fake(x, ratios, y)
                return y
        x_GB = split_blocks(x, self.format.block_of(width))
        groups = x_GB.shape[:-1]
        low_G, high_G = (None if r is None else r.expand(groups).reshape(-1) for r in (low, high))
        flat = x_GB.reshape(-1, x_GB.shape[-1])
        outer = self._tensor_scale(flat.detach(), low_G, high_G)
        into = torch.empty_like(flat, dtype=_matmul_dtype(x.device)) if out is None else out.view(flat.shape)
        with torch.set_grad_enabled(torch.is_grad_enabled() and out is None):
            y = kernel.fake_quantize(flat, low_G, high_G, outer, into, format=self.format, rule=self.rule)
        return join_blocks(y.unflatten(0, groups), width) if out is None else out

    def native_fake(self, x: Tensor, ratios: Tensor | None, out: Tensor, map: native.Map | None = None) -> None:
        """:meth:`fake` by the native kernel, after ``map``: write to ``out``. Its ``ratios`` [..., 2] broadcast to the blocks."""
        rows, ratios, outer = self._rows(x, ratios)
        native.fake_quantize(rows, ratios, outer, out, format=self.format, rule=self.rule, map=map)

    def native_pack(self, x: Tensor, ratios: Tensor | None, map: native.Map | None) -> Packed:
        """:meth:`pack` by the native kernel, after ``map``; arguments as :meth:`native_fake` takes them."""
        rows, ratios, outer = self._rows(x, ratios)
        codes, scales = native.quantize(rows, ratios, outer, format=self.format, rule=self.rule, map=map)
        return Packed(format=self.format, codes=codes, scales=scales, tensor_scale=outer)

    def _rows(self, x: Tensor, ratios: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``x`` as rows, ratios as the native kernels take them, and the scale of all of it."""
        block = self.format.block_of(x.shape[-1])
        rows, groups = x.view(-1, x.shape[-1]), -(-x.shape[-1] // block)
        low = high = None
        if ratios is not None:
            leading = x.shape[:-1] if ratios.dim() > 2 else ()
            ratios = ratios.to(torch.float32).expand(*leading, groups, 2).reshape(-1, groups, 2).contiguous()
            low, high = ratios.unbind(-1)
        outer = self._tensor_scale(split_blocks(rows, block), low, high) if self.format.has_tensor_scale else None
        return rows, ratios, outer

    def pack(self, x: Tensor, ratios: Tensor | None = None, blocks: Tensor | None = None) -> Packed:
        """``quantize(clip(x))`` in its own bits, by the Triton kernel; before that a transform with diagonal ``blocks``.

        ``ratios`` [G, 2] are clip ratios; ``kernels.has_map`` says which sizes of blocks go.
        """
        from microbat.kernels.quantize import quantize

        settings = self._fused(x, ratios, blocks)
        codes, scales = quantize(x, **settings)
        return Packed(format=self.format, codes=codes, scales=scales, tensor_scale=settings["outer"])

    def fake_transformed(self, x: Tensor, ratios: Tensor | None, blocks: Tensor) -> Tensor:
        """The values of :meth:`pack`, as :meth:`fake` gives them, without a gradient."""
        from microbat.kernels.quantize import fake

        return fake(x, **self._fused(x, ratios, blocks), dtype=_matmul_dtype(x.device))

    def _fused(self, x: Tensor, ratios: Tensor | None, blocks: Tensor | None) -> dict[str, Any]:
        from microbat.kernels.quantize import largest

        low, high = (None, None) if ratios is None else ratios.unbind(-1)
        settings: dict[str, Any] = {"format": self.format, "blocks": blocks, "low": low, "high": high}
        amax = largest(x, **settings) if self.format.has_tensor_scale else None
        outer = None if amax is None else kernel.tensor_scale(amax, self.format, self.rule)
        return {**settings, "rule": self.rule, "outer": outer}

    def _numbers(self, x: Tensor) -> Tensor:
        """Scale and terms of each block of ``x`` [..., K], a tail's by its real lanes alone."""
        block = self.format.block_of(x.shape[-1])
        whole = x.shape[-1] - x.shape[-1] % block
        parts = [x[..., :whole].unflatten(-1, (-1, block))] if whole else []
        parts += [x[..., None, whole:]] if whole < x.shape[-1] else []
        return torch.cat([sums.numbers_of(part, self.format, self.rule) for part in parts], dim=-2)

    def _tensor_scale(self, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor | None:
        """The scale of all of ``x``, clipped, where ratios are given for its blocks [..., G, B]."""
        if not self.format.has_tensor_scale:
            return None
        if low is None or high is None:
            amax = x.abs().amax()
        else:
            smallest, largest = kernel.bounds(x.to(torch.float32), low.detach(), high.detach())
            amax = torch.maximum(-smallest, largest).amax()
        return kernel.tensor_scale(amax.to(torch.float32), self.format, self.rule)


def nearest_codes(x: Tensor, scales: Scales, format: BlockFormat) -> QTensor:
    """``x`` [..., K] in a format with terms: for each number the code of the nearest value that its block has."""
    x = x.to(torch.float32) if scales.columns is None else x / scales.columns
    x_GB = split_blocks(x, format.block_of(x.shape[-1]))
    codes = join_blocks(sums.nearest(x_GB, sums.values_of(scales.numbers, format)), x.shape[-1])
    return QTensor(format=format, codes=codes, scales=scales.block, terms=scales.terms, columns=scales.columns)


def _matmul_dtype(device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
