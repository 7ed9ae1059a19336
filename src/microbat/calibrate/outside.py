"""Linear layers outside all blocks, quantized where a recipe asks for them by name (``also``): the output head, the layers of a
tower's mergers.

They get the scheme's formats on both sides, weights rounded to nearest, whatever the method does inside the blocks: no transform,
no clip, no statistics. What comes after them meets them quantized: mergers stand in the language model's quantized stream, and
all of them in a model that is distilled. An output head that is the embedding is not asked for: embeddings stay in float.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from microbat.linear import QuantBlock, QuantSite, install
from microbat.models.checkpoint import Checkpoint
from microbat.scheme import Scheme, matches


def asked(checkpoint: Checkpoint, scheme: Scheme) -> dict[str, nn.Linear]:
    """The layers that ``scheme`` asks for, by full name, without weights.

    ValueError, before any work, for a pattern that is of none, and for a layer that the formats do not fit.
    """
    if not scheme.also:
        return {}
    family, model = checkpoint.family, checkpoint.skeleton()
    places = (family.head, *family.others)
    there = {
        name: module
        for place in places
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.".startswith(f"{place}.") and f"{name}.weight" in checkpoint.names
    }
    for pattern in scheme.also:
        if not any(matches(pattern, name) for name in there):
            tied = family.head not in there and matches(pattern, family.head)
            raise ValueError(
                f"--also {pattern!r} "
                + (
                    "is this model's embedding too, which stays in float"
                    if tied
                    else "is no linear layer outside the blocks"
                )
                + f" (there: {', '.join(there) or 'none'})"
            )
    chosen = {name: module for name, module in there.items() if any(matches(p, name) for p in scheme.also)}
    for name, module in chosen.items():
        for quantizer in (scheme.weight, scheme.activation):
            if quantizer and quantizer.format.block and module.in_features % quantizer.format.block:
                raise ValueError(
                    f"layer {name!r}: K={module.in_features} is not a multiple of {quantizer.format.name}'s block of "
                    f"{quantizer.format.block} (scheme {scheme.text}); leave it out of --also"
                )
    return chosen


@torch.no_grad()
def rounded(checkpoint: Checkpoint, scheme: Scheme, below: tuple[str, ...] = ("",)) -> QuantBlock:
    """The codes of the layers that ``scheme`` asks for, of those whose names begin as ``below`` says; paths are full names."""
    assert scheme.weight is not None
    names = [name for name in asked(checkpoint, scheme) if name.startswith(below)]
    weights = {name: scheme.weight.quantize(checkpoint.tensor(f"{name}.weight").to(torch.float32)) for name in names}
    sites = (QuantSite(name=name, consumers=(name,), transform=None, quantizer=scheme.activation) for name in names)
    return QuantBlock(sites=tuple(sites), weights=weights)


@contextlib.contextmanager
def standing(model: nn.Module, outside: QuantBlock) -> Iterator[None]:
    """``model`` with quantized layers in their places until the context ends."""
    originals = {name: model.get_submodule(name) for name in outside.weights}
    install(model, outside)
    try:
        yield
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)
