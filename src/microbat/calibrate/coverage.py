"""What will be quantized and what will not, before any work: every linear layer and every other matrix of the model."""

import re
from dataclasses import dataclass

from torch import nn

from microbat.calibrate.outside import asked
from microbat.experts import ExpertLinear
from microbat.models.base import linear_layers
from microbat.models.checkpoint import Checkpoint
from microbat.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Covered:
    """One layer's fate. ``weights`` and ``activations`` name formats, None for float; ``reason`` says why it is left alone,
    and ``surprise`` that nobody asked for it."""

    layer: str
    shape: tuple[int, ...]
    weights: str | None = None
    activations: str | None = None
    reason: str = ""
    surprise: bool = False


def coverage(checkpoint: Checkpoint, scheme: Scheme) -> list[Covered]:
    """Every matrix of the model in the model's order, but for embeddings; then what ``scheme`` ignores without effect."""
    family, model = checkpoint.family, checkpoint.skeleton()
    blocks = {name: (stack, model.get_submodule(name)) for stack, name in checkpoint.blocks}
    known = {f"{name}.{path}" for name, (stack, block) in blocks.items() for path in linear_layers(stack, block)}
    readers = {f"{n}.{path}" for n, (stack, _) in blocks.items() for site in stack.sites for path in site.readers}
    also = asked(checkpoint, scheme)
    outside = tuple(f"{path}." for path in family.others)
    weights, activations = (role and role.format.name for role in (scheme.weight, scheme.activation))
    rows = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        matrices = {
            key: tuple(p.shape) for key, p in own.items() if p.dim() > 1 and not isinstance(module, nn.Embedding)
        }
        for key, shape in matrices.items():
            layer = name if isinstance(module, nn.Linear | ExpertLinear) else f"{name}.{key}"
            if scheme.ignores(layer):
                rows.append(Covered(layer=layer, shape=shape, reason="ignored, as asked"))
            elif layer in known:
                rows.append(Covered(layer=layer, shape=shape, weights=weights, activations=activations))
            elif name in readers:
                rows.append(Covered(layer=layer, shape=shape, reason="the router stays in float"))
            elif name in also:
                rows.append(Covered(layer=layer, shape=shape, weights=weights, activations=activations))
            elif name == family.head:
                rows.append(Covered(layer=layer, shape=shape, reason="the output head stays in float"))
            elif f"{name}.".startswith(outside):
                rows.append(Covered(layer=layer, shape=shape, reason="outside the blocks: stays in float"))
            else:
                reason = f"family {family.name!r} does not know it"
                rows.append(Covered(layer=layer, shape=shape, reason=reason, surprise=True))
    for pattern in scheme.ignore:
        alone = Scheme(text=scheme.text, weight=None, activation=None, ignore=(pattern,))
        if not any(alone.ignores(row.layer) for row in rows):
            rows.append(Covered(layer=pattern, shape=(), reason="--ignore matches no layer", surprise=True))
    return rows


def summarized(rows: list[Covered]) -> list[tuple[Covered, int]]:
    """Rows that differ only in the number of their block as one, numbers as ``*``, with how many they are."""
    groups: dict[Covered, int] = {}
    for row in rows:
        alike = Covered(**{**vars(row), "layer": re.sub(r"\.\d+\.", ".*.", row.layer)})
        groups[alike] = groups.get(alike, 0) + 1
    return list(groups.items())
