"""Rotations of a whole model that leave its function as it was: of the residual stream, and of each head's values.

Row vectors; R orthogonal. The gain of every RMSNorm goes into the linear layers that follow, since x R has the same norm
as x but not the same channels. Then, with h the residual stream and h R the rotated one:

    embedding, and what writes to the stream:  E R,  R^T W (rows of W are outputs)
    what reads the stream:                     W diag(gain) R
    values, head by head with H:               rows of v H^T,  columns of o H  (attention mixes tokens, not lanes)

A vision tower writes to the stream by the last layers of its mergers (``Family.feeds``); its own stream stays as it is.

(QuaRot, arXiv 2404.00456, section 4.) The authors subtract the mean of each embedding row first, which is right for
LayerNorm and wrong for RMSNorm (sheet B4, T8); here it is left alone. A tied output head is untied, since embedding and
head are rotated alike but only the head takes the final norm's gain.
"""

# Shapes: K hidden size, D head size, N out.

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from microbat.models.checkpoint import Checkpoint

ROWS = 4096  # of an embedding or a head, rotated at a time


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Orthogonal matrices: ``stream`` [K, K] of the residual stream, ``heads`` [blocks, D, D] of each block's values."""

    stream: Tensor
    heads: Tensor | None = None


class RotatedCheckpoint(Checkpoint):
    """A checkpoint whose stored tensors are read rotated; everything else about it is the original's."""

    def __init__(self, original: Checkpoint, rotation: Rotation):
        super().__init__(original.path)
        self.original, self.rotation = original, rotation

    @cached_property
    def config(self) -> Any:
        config = copy.deepcopy(self.original.config)
        config.tie_word_embeddings = False
        return config

    @property
    def config_changes(self) -> dict[str, Any]:
        return {**self.original.config_changes, "tie_word_embeddings": False}

    @property
    def names(self) -> Iterable[str]:
        head = f"{self.family.head}.weight"
        return dict.fromkeys((*self.original.names, head))

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, rotated in float64; in its stored dtype outside the blocks, float32 within."""
        family, stream = self.family, self.rotation.stream.to(torch.float64)
        module, _, kind = name.rpartition(".")
        if module == family.embedding:
            return _by_rows(lambda rows: rows @ stream, self.original.tensor(name))
        if module == family.norm:
            return torch.ones_like(self.original.tensor(name))
        if module == family.head:
            stored = self.original.tensor(name if name in self.original.names else f"{family.embedding}.weight")
            gain = self._read(f"{family.norm}.weight")
            return _by_rows(lambda rows: (rows * gain) @ stream, stored)
        if any(re.fullmatch(pattern, module) for pattern in family.feeds):
            return (stream.T @ self._read(name)).to(self.original.tensor(name).dtype)
        if not name.startswith(f"{family.blocks}."):
            return self.original.tensor(name)
        index, _, path = module.removeprefix(family.blocks + ".").partition(".")
        return self._in_block(name, int(index), path, kind)

    def _in_block(self, name: str, index: int, path: str, kind: str) -> Tensor:
        family, stream = self.family, self.rotation.stream.to(torch.float64)
        normed = [site for site in family.sites if site.normed]
        if path in [site.producer for site in normed]:
            return torch.ones_like(self.original.tensor(name))
        linear = path in family.writers or any(path in (*site.consumers, *site.readers) for site in family.sites)
        if not linear:
            return self.original.tensor(name)
        tensor = self._read(name)
        if kind == "weight":
            for site in normed:
                if path in (*site.consumers, *site.readers):
                    gain = self._read(f"{family.blocks}.{index}.{site.producer}.weight")
                    tensor = (tensor * gain) @ stream
        if path in family.writers:
            tensor = stream.T @ tensor  # rows of a weight, entries of a bias
        if self.rotation.heads is not None:
            head = self.rotation.heads[index].to(torch.float64)
            headed = next(site for site in family.sites if site.headed)
            if path == headed.producer:
                split = tensor.unflatten(0, (-1, self.head_dim))
                tensor = torch.einsum("hd...,de->he...", split, head).flatten(0, 1)
            if path in headed.consumers and kind == "weight":
                tensor = (tensor.unflatten(-1, (-1, self.head_dim)) @ head).flatten(-2)
        return tensor.to(torch.float32)

    def _read(self, name: str) -> Tensor:
        return self.original.tensor(name).to(torch.float64)


def _by_rows(function: Callable[[Tensor], Tensor], x_NK: Tensor) -> Tensor:
    """``function`` of rows in float64, a few thousand at a time, as a tensor like ``x_NK``: a vocabulary is long."""
    return torch.cat([function(rows.to(torch.float64)).to(x_NK.dtype) for rows in x_NK.split(ROWS)])
