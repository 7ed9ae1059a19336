"""Streaming statistics of a layer's input."""

# Shapes: T tokens, K width.

import torch
from torch import Tensor


class Hessian:
    """Running X^T X / T over batches of X [.., K], or Y^T X / T with another Y: float32 products, float64 sum."""

    def __init__(self, width: int, device: torch.device):
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor, other: Tensor | None = None) -> None:
        x_TK = x.reshape(-1, x.shape[-1]).to(torch.float32)
        other_TK = x_TK if other is None else other.reshape(x_TK.shape).to(torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            self._sum += other_TK.T @ x_TK
        self.tokens += x_TK.shape[0]

    @property
    def mean(self) -> Tensor:
        return self._sum / max(self.tokens, 1)
