"""Channels that stand out, as in large models, without a change of the function.

A model that was trained for minutes has none, and 4 bits cost it nothing. So some channels of what norms and ``up_proj`` put
out are made 8 to 32 times larger, and what reads them smaller by as much: powers of two, hence the same function bit for bit
where products are exact. It is SmoothQuant's folding (arXiv 2211.10438, equation 3) the other way round.
"""

from typing import Any

import torch
from torch import Tensor

ONE_IN = 16  # channels
SMALLEST, LARGEST = 3, 5  # powers of two


@torch.no_grad()
def grow(model: Any, seed: int) -> None:
    """Give a Qwen3-VL outlier channels, in place: language model and vision tower."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        _scale([layer.input_layernorm.weight], readers, generator)
        _scale([layer.post_attention_layernorm.weight], [mlp.gate_proj.weight, mlp.up_proj.weight], generator)
        _scale([mlp.up_proj.weight], [mlp.down_proj.weight], generator)
    for block in model.model.visual.blocks:
        _scale([block.norm1.weight, block.norm1.bias], [block.attn.qkv.weight], generator)
        _scale([block.norm2.weight, block.norm2.bias], [block.mlp.linear_fc1.weight], generator)


def _scale(makers: list[Tensor], readers: list[Tensor], generator: torch.Generator) -> None:
    """Rows, or entries, of ``makers`` times a factor per channel, columns of ``readers`` divided by it."""
    width = readers[0].shape[1]
    factors = torch.ones(width)
    chosen = torch.randperm(width, generator=generator)[: width // ONE_IN]
    factors[chosen] = 2.0 ** torch.randint(SMALLEST, LARGEST + 1, chosen.shape, generator=generator)
    for maker in makers:
        maker.mul_(factors.to(maker).view(-1, *[1] * (maker.ndim - 1)))
    for reader in readers:
        reader.div_(factors.to(reader))
