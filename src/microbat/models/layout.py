"""Tensors that a checkpoint stores otherwise than the model holds them: under another name, expert by expert, or fused."""

# Shapes: E experts, N out, K in.

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A tensor of a block, ``held`` by the model under this name and ``stored`` under that, both inside the block.

    A ``*`` in ``stored`` is an expert's number: one tensor [N, K] each, held as [E, N, K]. ``inputs``: the entry of the model's
    config that is K, where the tensor may be stored with its last two axes exchanged; it is where its last is not that long.
    ``half`` 0 or 1: the first or second half of the rows that are stored as one.
    """

    held: str
    stored: str
    inputs: str = ""
    half: int | None = None

    def held_form(self, tensors: list[Tensor], config: Any) -> Tensor:
        """What the model of ``config`` holds of the stored ``tensors``, several where there is one for each expert."""
        tensor = torch.stack(tensors) if "*" in self.stored else tensors[0]
        if self.inputs and tensor.shape[-1] != getattr(config, self.inputs):
            tensor = tensor.mT
        return tensor if self.half is None else tensor.chunk(2, dim=-2)[self.half]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Names of the stored tensors that a held one is made of, and how (None: it is stored as it is held)."""

    names: tuple[str, ...]
    layout: Layout | None = None


def sources(stored: Iterable[str], blocks: str, layouts: tuple[Layout, ...]) -> Mapping[str, Source]:
    """Held tensor -> what it is made of, for all ``stored`` names of a checkpoint with its ``blocks`` at that path.

    ValueError where an expert between others is missing.
    """
    patterns = [
        (re.compile(re.escape(f"{blocks}.") + r"(\d+)\." + re.escape(layout.stored).replace(r"\*", r"(\d+)")), layout)
        for layout in layouts
    ]
    result: dict[str, Source] = {}
    found: dict[tuple[str, Layout], dict[int, str]] = {}
    for name in stored:
        matches = [(match, layout) for pattern, layout in patterns if (match := pattern.fullmatch(name))]
        if not matches:
            result[name] = Source(names=(name,))
        for match, layout in matches:
            number = int(match[2]) if "*" in layout.stored else 0
            found.setdefault((f"{blocks}.{match[1]}.{layout.held}", layout), {})[number] = name
    for (held, layout), numbered in found.items():
        missing = next((n for n in range(1 + max(numbered)) if n not in numbered), None)
        if missing is not None:
            raise ValueError(f"the checkpoint lacks expert {missing} of {held} (stored as {layout.stored})")
        result[held] = Source(names=tuple(numbered[n] for n in sorted(numbered)), layout=layout)
    return result


def per_expert(path: str, gate: str, up: str, down: str) -> tuple[Layout, ...]:
    """Experts stored one by one below ``path``, their layers under these names; held at ``mlp.experts``."""
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return tuple(
        Layout(held=f"mlp.experts.{ours}.weight", stored=f"{path}.*.{theirs}.weight") for ours, theirs in names.items()
    )
