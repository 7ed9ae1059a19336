"""transformers: microbat folders by microbat's quantizer, exports by compressed-tensors."""

from pathlib import Path

from torch import Tensor

from microbat.engines.base import Engine, Run, watched


class Transformers(Engine):
    name = "transformers"
    install = "pip install transformers compressed-tensors"

    def run(self, folder: Path, tokens: Tensor, layers: list[str]) -> Run:
        from transformers import AutoModelForCausalLM

        return watched(AutoModelForCausalLM.from_pretrained(folder), tokens, layers)
