"""Linear layers that share an input as one, the way serving engines run them: q, k and v; gate and up; a block's experts.

Their weights stay apart, with the scales that each was calibrated with; what they share, the transformed and quantized
input, is computed once.
"""

# Shapes: T tokens, K in, N out of all layers together, D lanes of a head, E experts.

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from microbat.experts import ExpertLinear, Experts
from microbat.export.shard import PACKED, StoredBlock
from microbat.kv import KVQuantizer
from microbat.linear import QuantBlock, SiteInput, install
from microbat.runtime.composite import packed_linear
from microbat.transforms.base import Transform


class FusedLinear(nn.Module):
    """The outputs [T, N] of several layers on one input [T, K], side by side."""

    def __init__(self, parts: Iterable[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def fuse(stored: StoredBlock, paths: Sequence[str], *, dtype: torch.dtype, biases: bool = True) -> FusedLinear:
    """The layers at ``paths`` of a block as one: packed where the block holds their codes, else in floats of ``dtype``.

    Without ``biases`` for an engine that adds them later; those that calibration gave are ours to add.
    """
    inputs = {}
    for site in stored.quantized.sites:
        ours = [path for path in site.consumers if path in paths]
        inputs |= dict.fromkeys(ours, SiteInput(site.transform, site.quantizer, num_consumers=len(ours)))
    parts: list[nn.Module] = []
    for path in paths:
        own = stored.floats.get(f"{path}.bias") if biases else None
        bias = stored.quantized.biases.get(path, own)
        bias = None if bias is None else bias.to(dtype)
        if path in stored.quantized.weights:
            parts.append(packed_linear(inputs[path], stored.quantized.weights[path], bias, dtype=dtype))
        else:
            weight = stored.floats[f"{path}.weight"].to(dtype)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True)
            parts.append(linear.requires_grad_(False))
    return FusedLinear(parts)


def experts(stored: StoredBlock, path: str, act_fn: nn.Module, num_chosen: int, *, dtype: torch.dtype) -> Experts:
    """The experts at ``path`` of a block, ``num_chosen`` of them for each token: their layers packed where the block holds
    their codes, else in floats of ``dtype``."""
    inside = f"{path}."
    weights = {key.removeprefix(inside): q for key, q in stored.quantized.weights.items() if key.startswith(inside)}
    floats = {key.removeprefix(inside): w for key, w in stored.floats.items() if key.startswith(inside)}
    shape = stored.quantized.shape(f"{path}.down_proj") if "down_proj" in weights else floats["down_proj.weight"].shape
    with torch.device("meta"):
        module = Experts(shape[0], num_chosen, shape[1], shape[2], act_fn)
    for key, weight in floats.items():
        module.set_submodule(key.removesuffix(".weight"), ExpertLinear.of(weight.to(dtype)))
    sites = (
        replace(site, consumers=tuple(consumer.removeprefix(inside) for consumer in site.consumers))
        for site in stored.quantized.sites
        if site.consumers[0].startswith(inside)
    )
    install(module, QuantBlock(sites=tuple(sites), weights=weights), partial(packed_linear, dtype=dtype))
    return module


class _Inverted(nn.Module):
    """A transform of constants: the inverse that queries need is computed once, not for every token."""

    matrix: Tensor

    def __init__(self, transform: Transform, width: int):
        super().__init__()
        self.transform = transform
        self.register_buffer("matrix", transform.inverse_t(torch.eye(width)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(x)

    def inverse_t(self, w: Tensor) -> Tensor:
        return w @ self.matrix.to(w.dtype)


class TokenCache(nn.Module):
    """Quantizes the keys and values of new tokens before an engine stores them in a cache of its own.

    The engine's cache then holds the calibrated values in 16 or 32 bits: the numbers of the scheme, not its memory.
    """

    def __init__(self, kv: KVQuantizer, head_size: int):
        super().__init__()
        inverted = None if kv.transform is None else _Inverted(kv.transform, head_size)
        self.kv, self.head_size = KVQuantizer(kv.key, kv.value, inverted), head_size

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [T, heads * D], after the position encoding; each head's lanes are quantized on their own."""
        heads = [
            t.reshape(t.shape[0], -1, self.head_size).transpose(0, 1)[None].contiguous() for t in (query, key, value)
        ]
        query, key, value = (t[0].transpose(0, 1).flatten(1) for t in self.kv(*heads))
        return query, key, value


def locate(prefix: str, blocks: str, fused: Mapping[str, Sequence[str]]) -> tuple[int, tuple[str, ...]] | None:
    """Which block and which of its linear layers an engine's module of this full name is; None outside the blocks.

    ``fused``: the engine's name of a module -> the names of the layers in it.
    """
    match = re.fullmatch(re.escape(blocks) + r"\.(\d+)\.(.+)", prefix)
    if match is None:
        return None
    parent, _, name = match[2].rpartition(".")
    return int(match[1]), tuple(f"{parent}.{part}".lstrip(".") for part in fused.get(name, (name,)))


def not_floats(blocks: str, layers: Iterable[str], biased: Iterable[str] = (), modules: Iterable[str] = ()) -> str:
    """A regular expression for the stored tensors that an engine's own loader leaves to microbat: the weights of
    ``layers``, given by their full names, biases that calibration gave to those of ``biased``, all of ``modules``, and what
    belongs to no layer."""
    given = "|".join(re.escape(layer) for layer in sorted(biased)) or "(?!)"
    weights = "|".join(re.escape(layer) for layer in sorted(layers)) or "(?!)"
    whole = "|".join(re.escape(module) for module in sorted(modules)) or "(?!)"
    others = rf"tokens|outputs|{re.escape(blocks)}\.\d+\.(?:sites|kv)\..*|(?:{given})\.bias|(?:{whole})\..*"
    return rf"^(?:{others}|(?:{weights})\.(?:\d+\.)?(?:{'|'.join(PACKED)}))$"
