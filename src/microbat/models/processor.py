"""Pictures with text, as what a vision-language model is called with.

A processor of transformers asks for torchvision as soon as a model can also read videos; its parts do not: the image
processor, the tokenizer, the chat template. Between them stands one step, done here: the template's one token per
picture is repeated for every merged patch of it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILES = ("preprocessor_config.json", "processor_config.json")  # either says how pictures become patches


def has_processor(path: Path) -> bool:
    """Whether a model's folder says how pictures become patches."""
    return any((path / file).is_file() for file in FILES)


class Processor:
    """That of the model in a folder; ValueError, naming it, where it takes no pictures or has no chat template."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
        from transformers.utils import is_torchvision_available

        self.token_id = getattr(AutoConfig.from_pretrained(path), "image_token_id", None)
        if self.token_id is None or not has_processor(path):
            missing = "image_token_id in its config.json" if self.token_id is None else FILES[0]
            raise ValueError(f"{path} has no {missing}: it cannot be asked about pictures")
        backend = {} if is_torchvision_available() else {"backend": "pil"}
        self.images = AutoImageProcessor.from_pretrained(path, **backend)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.token = self.tokenizer.convert_ids_to_tokens(self.token_id)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"the tokenizer in {path} has no chat template; images need one to stand in")

    def __call__(self, name: str, picture: Any, question: str, answer: str | None = None) -> dict[str, Tensor]:
        """A conversation: a ``picture`` (of PIL) with a ``question``, then its ``answer``, or where the model is to begin it.

        input_ids and mm_token_type_ids [1, T], pixel_values and image_grid_thw. ValueError, with the ``name`` of the pair, where
        the chat template does not name one picture.
        """
        patches = self.images(images=[picture], return_tensors="pt")
        input_ids = self._ids(name, question, answer, patches["image_grid_thw"])
        return {
            "input_ids": input_ids,
            "mm_token_type_ids": (input_ids == self.token_id).to(torch.int32),
            "pixel_values": patches["pixel_values"].to(torch.float32),
            "image_grid_thw": patches["image_grid_thw"],
        }

    def answered(self, name: str, picture: Any, question: str, answer: str) -> tuple[dict[str, Tensor], int]:
        """The conversation up to the token that ends the answer, and how many tokens the answer is with that one."""
        whole = self(name, picture, question, answer)
        asked, said = self._ids(name, question, None, whole["image_grid_thw"])[0], whole["input_ids"][0]
        shared = min(len(asked), len(said))
        # What both begin with: a template may prompt otherwise than it answers.
        start = int((asked[:shared] == said[:shared]).cumprod(0).sum())
        end = self.tokenizer.eos_token_id
        ends = torch.empty(0) if end is None else (said[start:] == end).nonzero()
        stop = start + int(ends[0]) + 1 if len(ends) else len(said)
        kept = {key: whole[key][:, :stop] for key in ("input_ids", "mm_token_type_ids")}
        return {**whole, **kept}, stop - start

    def tokens_of(self, grid: Tensor) -> int:
        """How many tokens a picture takes, whose patches lie in a ``grid``."""
        return int(grid.prod()) // self.images.merge_size**2

    def _ids(self, name: str, question: str, answer: str | None, grid: Tensor) -> Tensor:
        """The conversation's tokens [1, T], those of a picture whose patches lie in a ``grid`` among them."""
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        ]
        messages += [] if answer is None else [{"role": "assistant", "content": answer}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
        places = text.count(self.token)
        if places != 1:
            raise ValueError(f"{name}: its text has {places} places for images (token {self.token}), and 1 image")
        text = text.replace(self.token, self.token * self.tokens_of(grid))
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]])
