"""Channels in another order: the map that groups like with like before blocks are cut, alone or before another map. One gather,
exact in every format."""

# Shapes: K last axis.

from typing import Any, ClassVar

import torch
from torch import Tensor

from microbat.transforms.base import Transform, rebuilt


class Permutation(Transform):
    """``forward(x)[..., j] = x[..., order[j]]``; ``order`` int32 [K], the identity where it is not given."""

    name: ClassVar[str] = "permutation"
    order: Tensor

    def __init__(self, *, width: int, order: Tensor | None = None):
        super().__init__()
        order = torch.arange(width) if order is None else order
        if not torch.equal(order.sort().values.cpu(), torch.arange(width, dtype=order.dtype)):
            raise ValueError(f"order is not a permutation of {width} channels")
        self.width = width
        self.register_buffer("order", order.to(torch.int32))

    def settings(self) -> dict[str, Any]:
        return {"width": self.width}

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)

    def inverse_t(self, w: Tensor) -> Tensor:
        return self(w)  # orthogonal: M^-T = M


class Ordered(Transform):
    """``map`` of the channels in another order: ``forward(x) = map(x[..., order])``. ``map`` is a transform, or its name and
    settings, as it is stored."""

    name: ClassVar[str] = "ordered"

    def __init__(self, *, map: Transform | dict[str, Any], order: Tensor | None = None):
        super().__init__()
        map = rebuilt(map) if isinstance(map, dict) else map
        self.map, self.width = map, map.width
        self.first = Permutation(width=map.width, order=order)

    def settings(self) -> dict[str, Any]:
        return {"map": self.map.stored()}

    def forward(self, x: Tensor) -> Tensor:
        return self.map(self.first(x))

    def inverse_t(self, w: Tensor) -> Tensor:
        return self.map.inverse_t(self.first(w))
