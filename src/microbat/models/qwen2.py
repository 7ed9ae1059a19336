"""Qwen2 and Qwen2.5, dense: as Llama, with biases on q, k and v."""

from microbat.models.base import DECODER_SITES, Family

QWEN2 = Family(name="qwen2", sites=DECODER_SITES)
