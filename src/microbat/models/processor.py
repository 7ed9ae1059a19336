"""Pictures with text, as what a vision-language model is called with.

A processor of transformers asks for torchvision as soon as a model can also read videos; its parts do not: the image
processor, the tokenizer, the chat template. Between them stands one step, done here: the template's one token per
picture is repeated for every merged patch of it.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Message = dict[str, Any]


class Processor:
    """That of the model in a folder; ValueError, naming it, where it has none."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.image_token = getattr(AutoConfig.from_pretrained(path), "image_token_id", None)
        try:
            self.image_processor = AutoImageProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} has no image processor (preprocessor_config.json): {error}") from error
        if self.image_token is None:
            raise ValueError(f"{path}: config.json has no image_token_id, so the model takes no pictures")

    def __call__(self, picture: Any, messages: list[Message], *, answer: bool) -> dict[str, Tensor]:
        """A conversation about a ``picture`` (of PIL), which stands before its first message: input_ids and mm_token_type_ids
        [1, T], pixel_values and image_grid_thw. ``answer``: it ends where the model is to answer."""
        first, *others = messages
        shown = {**first, "content": [{"type": "image"}, {"type": "text", "text": first["content"]}]}
        text = self.tokenizer.apply_chat_template([shown, *others], tokenize=False, add_generation_prompt=answer)
        pixels = self.image_processor(picture, return_tensors="pt")
        merged = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        text = text.replace(self._placeholder, self._placeholder * merged)
        input_ids = torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids])
        found = int((input_ids == self.image_token).sum())
        if found != merged:
            raise ValueError(
                f"the chat template makes {found} tokens of a picture for which the image processor makes {merged}: "
                f"it must name {self._placeholder} once per picture"
            )
        return {"input_ids": input_ids, "mm_token_type_ids": (input_ids == self.image_token).int(), **pixels}

    @cached_property
    def _placeholder(self) -> str:
        return self.tokenizer.convert_ids_to_tokens(self.image_token)
