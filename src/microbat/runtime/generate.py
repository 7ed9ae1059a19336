"""Text from a loaded model, token by token as it comes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from microbat.runtime.cache import new_cache


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    show: Callable[[str], None] = lambda piece: None,
) -> str:
    """The greedy continuation of ``prompt``: at most ``max_new_tokens``, to the end of text or of the context.

    ``show`` gets each piece as soon as its tokens make whole characters. The cache is quantized where the model's scheme
    says so. Raises ValueError for an empty prompt, and for one that leaves no room in the model's context.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            show(text)

    tokens = tokenizer(prompt, return_tensors="pt").input_ids.to(next(model.parameters()).device)
    length, context = tokens.shape[1], model.config.get_text_config().max_position_embeddings
    if length == 0:
        raise ValueError("the prompt is empty")
    if length >= context:
        raise ValueError(f"the prompt has {length} tokens; the model's context of {context} has no room for another")
    pieces: list[str] = []
    with torch.inference_mode():
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=min(max_new_tokens, context - length),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            past_key_values=new_cache(model),
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return "".join(pieces)
