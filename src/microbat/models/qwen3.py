"""Qwen3, dense: as Llama, with an RMSNorm on each head's query and key, and a head size that the config names."""

from microbat.models.base import DECODER_SITES, Family

QWEN3 = Family(name="qwen3", sites=DECODER_SITES)
