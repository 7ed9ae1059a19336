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

    A ``*`` in ``stored`` is an expert's number: one tensor [N, K] each, held as [E, N, K]; so is what engines store in place of
    a weight (``weight_packed``, ``weight_scale``). ``inputs``: the entry of the model's config that is K, where the tensor may be
    stored with its last two axes exchanged; it is where its last is not that long.
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

    @property
    def pattern(self) -> str:
        """A regular expression for the stored name; where there is one for each expert, for its number and what follows
        ``weight`` as well."""
        name = re.escape(self.stored)
        return name if "*" not in self.stored else name.replace(r"\*", r"(?P<expert>\d+)") + r"(?P<tail>(_\w+)?)"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Names of the stored tensors that a held one is made of, and how (None: it is stored as it is held)."""

    names: tuple[str, ...]
    layout: Layout | None = None


def sources(stored: Iterable[str], blocks: str, layouts: tuple[Layout, ...]) -> Mapping[str, Source]:
    """Held tensor -> what it is made of, for all ``stored`` names of a checkpoint with its ``blocks`` at that path.

    ValueError where an expert between others is missing.
    """
    inside = re.escape(f"{blocks}.")
    patterns = [(re.compile(rf"{inside}(?P<block>\d+)\.{layout.pattern}"), layout) for layout in layouts]
    result: dict[str, Source] = {}
    found: dict[tuple[str, Layout], dict[int, str]] = {}
    for name in stored:
        matches = [(match, layout) for pattern, layout in patterns if (match := pattern.fullmatch(name))]
        if not matches:
            result[name] = Source(names=(name,))
        for match, layout in matches:
            part = {"expert": 0, "tail": "", **match.groupdict()}
            held = f"{blocks}.{part['block']}.{layout.held}{part['tail']}"
            found.setdefault((held, layout), {})[int(part["expert"])] = name
    for (held, layout), numbered in found.items():
        missing = next((n for n in range(1 + max(numbered)) if n not in numbered), None)
        if missing is not None:
            raise ValueError(f"the checkpoint lacks expert {missing} of {held} (stored as {layout.stored})")
        result[held] = Source(names=tuple(numbered[n] for n in sorted(numbered)), layout=layout)
    return result


def stored_form(block: Mapping[str, Tensor], layouts: tuple[Layout, ...]) -> dict[str, Tensor]:
    """The tensors of a ``block``, by the names that the model holds them under, as a checkpoint stores them; the inverse of
    :meth:`Layout.held_form`, with no axes exchanged."""
    result: dict[str, Tensor] = {}
    for name, tensor in block.items():
        layout = next((one for one in layouts if name.startswith(one.held)), None)
        if layout is None:
            result[name] = tensor
        elif "*" in layout.stored:
            tail = name.removeprefix(layout.held)
            result |= {layout.stored.replace("*", str(e)) + tail: one for e, one in enumerate(tensor.unbind())}
        elif layout.half is None:
            result[layout.stored] = tensor
        elif layout.half == 0:
            halves = [block[one.held] for one in layouts if one.stored == layout.stored]
            result[layout.stored] = torch.cat(halves, dim=-2)
    return result


def per_expert(path: str, gate: str, up: str, down: str) -> tuple[Layout, ...]:
    """Experts stored one by one below ``path``, their layers under these names; held at ``mlp.experts``."""
    names = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return tuple(
        Layout(held=f"mlp.experts.{ours}.weight", stored=f"{path}.*.{theirs}.weight") for ours, theirs in names.items()
    )
