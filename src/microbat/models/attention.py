"""The attention function of every model here: transformers' own scaled dot product, with the cache quantized first.

A block whose attention module holds a ``kv`` (:class:`microbat.kv.KVQuantizer`) has its keys, queries and values passed
through it, after the position encoding and before the product. Models without one compute exactly what they did.
"""

from typing import Any

from torch import Tensor, nn

NAME = "microbat"


def attention_function() -> str:
    """The name under which transformers finds the function; registered at the first call."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    kv = getattr(module, "kv", None)
    if kv is not None:
        query, key, value = kv(query, key, value)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
