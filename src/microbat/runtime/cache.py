"""A cache of transformers that keeps keys and values as packed codes and scales.

Attention is transformers' own and wants floats: at every token the codes of one layer after the other are decoded, all tokens of
it, and dropped when the next layer's are. Between tokens there are codes alone; while one is made, one layer's floats too, and
float32 copies of them while they are decoded.
"""

# Shapes: S sequences, H heads, L tokens, D lanes of a head.

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from microbat.formats.packing import pack, unpack
from microbat.kv import KVQuantizer


class QuantizedCache(Cache):
    """``model.generate(..., past_key_values=QuantizedCache(model))``: the same tokens, a fraction of the memory.

    Raises ValueError for a model whose scheme leaves the cache in 16 bits.
    """

    def __init__(self, model: nn.Module):
        quantizers = [module for module in model.modules() if isinstance(module, KVQuantizer)]
        if not quantizers:
            raise ValueError("this model's scheme leaves the cache in 16 bits (KV16); nothing to quantize")
        super().__init__(layers=[_Layer(quantizer) for quantizer in quantizers])

    @property
    def nbytes(self) -> int:
        """Bytes of all codes and scales."""
        return sum(t.nbytes for layer in self.layers for parts in layer.stored for t in parts.values())


def new_cache(model: nn.Module) -> QuantizedCache | None:
    """What ``model.generate`` wants as ``past_key_values``: None, transformers' own, where the cache stays in 16 bits."""
    return QuantizedCache(model) if any(isinstance(module, KVQuantizer) for module in model.modules()) else None


class _Layer(CacheLayerMixin):
    """One block's tokens: the packed parts of its keys and of its values, each [S, H, L, ...]."""

    is_sliding = False

    def __init__(self, quantizer: KVQuantizer):
        super().__init__()
        self.quantizer = quantizer
        self.stored: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.is_initialized = True
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' codes; return all tokens' keys (in the transformed basis) and values."""
        new = self.quantizer.store(key_states, value_states)
        width = key_states.shape[-1]
        for held, tensor in zip(self.stored, new, strict=True):
            for name, part in pack(tensor).items():
                held[name] = torch.cat([held[name], part], dim=-2) if name in held else part
        self.length += key_states.shape[-2]
        everything = [unpack(h, t.format, width) for h, t in zip(self.stored, new, strict=True)]
        return self.quantizer.restore(*everything, dtype=key_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.stored, self.length = ({}, {}), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for held in self.stored:
            for name in held:
                held[name] = held[name].index_select(0, beam_idx.to(held[name].device))
