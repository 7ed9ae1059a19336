"""llama.cpp, by the package xllamacpp: a microbat folder as GGUF, in a temporary file.

Its server gives probabilities where it generates, so each token of the sequence is asked for once, with the tokens before
it as the prompt. What is generated is forced to be a letter: the server keeps silent about tokens that are parts of
characters, and the probabilities it reports are those before any forcing.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from microbat.engines.base import Engine, Run, text_alone
from microbat.export import gguf
from microbat.formats.block import BlockFormat, Level
from microbat.formats.element import FP32, INT8
from microbat.quantizers.base import AbsMax

FORCED = 1000.0  # added to a logit, more than any other reaches
POSITIONS = 8  # the last of a sequence; all probabilities of one are a few megabytes of JSON
Q8_0 = BlockFormat(name="q8_0", element=INT8, levels=(Level(group=32, element=FP32),))


class LlamaCpp(Engine):
    name = "llama.cpp"
    install = "pip install gguf xllamacpp"
    activations = AbsMax(format=Q8_0)

    def run(self, folder: Path, tokens: Tensor, layers: list[str], images: dict[str, Tensor]) -> Run:
        text_alone(self.name, images)
        import xllamacpp
        from transformers import AutoTokenizer

        letter = AutoTokenizer.from_pretrained(folder)("a", add_special_tokens=False).input_ids[-1]
        with tempfile.TemporaryDirectory() as place:
            params = xllamacpp.CommonParams()
            params.model.path = str(gguf.export(folder, Path(place) / "model.gguf", target=self.name))
            params.n_ctx, params.verbosity = max(256, 2 * len(tokens)), 0
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            server = xllamacpp.Server(params)
            body = {"n_predict": 1, "n_probs": 1 << 20, "logit_bias": [[letter, FORCED]], "cache_prompt": True}
            ends = range(max(1, len(tokens) - POSITIONS + 1), len(tokens) + 1)
            rows = [_row(server.handle_completions({**body, "prompt": tokens[:end].tolist()})) for end in ends]
            del server
        return Run(logits=torch.stack(rows), dtype=torch.float32)


def _row(answer: dict) -> Tensor:
    """Log-probabilities [V] of the one token that was generated."""
    listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    row = torch.full((len(listed),), -torch.inf)
    row[torch.tensor([token["id"] for token in listed])] = torch.tensor([token["logprob"] for token in listed])
    return row
