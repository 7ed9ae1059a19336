"""Streams: the activations of all calibration samples at one place of the model, and what the model does around its blocks.

Text is cut to one length, so a stream of it is a tensor [S, L, K], and the model passes the same to its blocks for every
sequence. Images with their questions have lengths, positions and masks of their own. Where a stream lies is
:mod:`microbat.calibrate.memory`'s to say.

Rather than knowing what each family does before and between its blocks (packing patches, windows, scattering the features
of a tower among the tokens, adding DeepStack's to the first blocks' outputs), the engine lets the model's own ``forward`` run
once per sample, with something that takes notes in every block's place (:func:`passage`).
"""

# Shapes: S samples, R of them, L tokens of each, T of some together, K width.

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from microbat.models.base import Stack

Sample = dict[str, Tensor]  # what the model is called with for one sequence, by name


class Activations:
    """Float32 activations of all samples: ``values`` [S, L, K], or tokens [T, K], one sample after the other, where samples
    have ``lengths`` of their own. ``x[rows]`` are those of some on ``device``, wherever the others lie: [R, L, K] or [T, K]."""

    def __init__(self, values: Tensor, lengths: tuple[int, ...], device: torch.device):
        self.values, self.lengths, self.device = values, lengths, device
        self._starts = (0, *accumulate(lengths)) if lengths else range(values.shape[0] + 1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, rows: Tensor) -> Tensor:
        if not self.lengths:
            return self.values[rows].to(self.device)
        return torch.cat([self.values[self._starts[row] : self._starts[row + 1]] for row in rows.tolist()]).to(
            self.device
        )

    def write(self, rows: Tensor, x: Tensor) -> None:
        """Replace samples ``rows``, which follow each other."""
        self.values[self._starts[rows[0]] : self._starts[rows[-1] + 1]] = x

    def batches(self, size: int) -> Iterable[Tensor]:
        """Numbers of samples, ``size`` at a time."""
        return torch.arange(len(self)).split(size)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What a model does around the blocks of a stack for one sample: ``inputs``, what the first block gets; ``calls``, what each
    gets besides, by position and by name; ``added`` to what each block gives before the next one gets it, None for nothing."""

    inputs: Tensor
    calls: list[tuple[tuple, dict[str, Any]]]
    added: list[Tensor | None]


class _Done(Exception):
    """Raised where the model need not run any further."""


class _Notes(nn.Module):
    """In a block's place: takes notes of what it is called with and gives zeros, so that what the model adds shows alone."""

    def __init__(self, block: nn.Module, seen: list[tuple[Tensor, tuple, dict[str, Any]]], last: bool):
        super().__init__()
        self.block, self.seen, self.last = block, seen, last

    def __getattr__(self, name: str) -> Any:  # models ask their blocks for settings
        with contextlib.suppress(AttributeError):
            return super().__getattr__(name)
        return getattr(super().__getattr__("block"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen.append((x, args, kwargs))
        if self.last:
            raise _Done
        return torch.zeros_like(x)


class _Replay(nn.Module):
    """In the place of a block that has run: gives what it gave, or its input where only the next block asked for that."""

    def __init__(self, output: Tensor | None):
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if self.output is None else self.output


@torch.no_grad()
def passage(model: nn.Module, stack: Stack, sample: Sample, before: dict[str, dict[int, Tensor]]) -> Passage:
    """Run ``model`` on ``sample`` as far as the last block of ``stack``.

    ``before``: by path, towers that have run, with the outputs of those of their blocks that others read than the next block.
    """
    seen: list[tuple[Tensor, tuple, dict[str, Any]]] = []
    blocks = model.get_submodule(stack.blocks)
    replaced = {f"{stack.blocks}.{i}": _Notes(block, seen, i == len(blocks) - 1) for i, block in enumerate(blocks)}
    for path, outputs in before.items():
        replaced |= {f"{path}.{i}": _Replay(outputs.get(i)) for i in range(len(model.get_submodule(path)))}
    originals = {path: model.get_submodule(path) for path in replaced}
    try:
        for path, module in replaced.items():
            model.set_submodule(path, module)
        with contextlib.suppress(_Done):
            model(**sample, use_cache=False)
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)
    added = [x if x.any() else None for x, _, _ in seen[1:]]
    return Passage(inputs=seen[0][0], calls=[(args, kwargs) for _, args, kwargs in seen], added=[*added, None])
