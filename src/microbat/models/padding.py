"""Zeros that make a width a multiple of a format's block, where the model's own function leaves them zeros.

The towers of Qwen3-VL are 4304 wide between fc1 and fc2, 134.5 blocks of 32. Rows of zeros, and zeros in the bias, go to what
makes that width, columns of zeros to what reads it, and the config says 4320: the function is the same exactly, since GELU
and SwiGLU keep zero; every method, format and engine sees whole blocks; transforms may mix the new lanes with the old (sheet
C3, T16, option a). The price is 16 lanes in 4304.
"""

# Shapes: N rows (outputs), K columns (inputs).

import copy
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from microbat.documents import read_json
from microbat.models.base import Stack
from microbat.models.checkpoint import Checkpoint


class PaddedCheckpoint(Checkpoint):
    """A checkpoint whose ``stacks`` have their inner width read as a multiple of ``block``; everything else is the original's."""

    def __init__(self, original: Checkpoint, stacks: Iterable[Stack], block: int):
        super().__init__(original.path)
        self.original, self.stacks, self.block = original, tuple(stacks), block

    @cached_property
    def config(self) -> Any:
        config = copy.deepcopy(self.original.config)
        for stack in self.stacks:
            part = getattr(config, stack.config) if stack.config else config
            setattr(part, stack.inner.entry, self._width(stack))
        return config

    @property
    def config_changes(self) -> dict[str, Any]:
        changes = dict(self.original.config_changes)
        written = read_json(self.path / "config.json")
        for stack in self.stacks:
            own = {stack.inner.entry: self._width(stack)}
            changes |= {stack.config: {**written[stack.config], **own}} if stack.config else own
        return changes

    @property
    def names(self) -> Iterable[str]:
        return self.original.names

    def tensor(self, name: str) -> Tensor:
        tensor = self.original.tensor(name)
        for stack in (stack for stack in self.stacks if name.startswith(f"{stack.blocks}.")):
            module, _, kind = name.rpartition(".")
            path = module.removeprefix(f"{stack.blocks}.").partition(".")[2]
            if path in stack.inner.makers:
                last = (0, 0) if kind == "weight" else ()
                return pad(tensor, (*last, 0, self._width(stack) - tensor.shape[0]))
            if path == stack.inner.reader and kind == "weight":
                return pad(tensor, (0, self._width(stack) - tensor.shape[1]))
        return tensor

    def _width(self, stack: Stack) -> int:
        width = getattr(self.original.config_of(stack), stack.inner.entry)
        return width + -width % self.block


def padded(checkpoint: Checkpoint, stacks: Iterable[Stack], block: int) -> Checkpoint:
    """``checkpoint`` with the inner widths of ``stacks`` padded to multiples of ``block``; itself where they all are."""
    wanting = [
        stack
        for stack in stacks
        if stack.inner is not None and getattr(checkpoint.config_of(stack), stack.inner.entry) % block
    ]
    return PaddedCheckpoint(checkpoint, wanting, block) if wanting else checkpoint
