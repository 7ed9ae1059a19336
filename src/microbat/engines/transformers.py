"""transformers: microbat folders by microbat's quantizer, exports by compressed-tensors."""

from pathlib import Path

from torch import Tensor

from microbat.engines.base import Engine, Run, watched
from microbat.models.checkpoint import auto_class


class Transformers(Engine):
    name = "transformers"
    install = "pip install transformers compressed-tensors"

    def run(self, folder: Path, tokens: Tensor, layers: list[str], images: dict[str, Tensor]) -> Run:
        return watched(auto_class(folder).from_pretrained(folder), tokens, layers, images)
