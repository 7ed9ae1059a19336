"""microbat's own runtime."""

from pathlib import Path

from torch import Tensor

from microbat.engines.base import Engine, Run, watched
from microbat.runtime.load import load


class Microbat(Engine):
    name = "microbat"
    install = "pip install microbat"

    def run(self, folder: Path, tokens: Tensor, layers: list[str], images: dict[str, Tensor]) -> Run:
        return watched(load(folder), tokens, layers, images)
