"""Llama and the models built like it (SmolLM2, Llama 3): RMSNorm, rotary attention with grouped keys, SwiGLU."""

from microbat.models.base import DECODER_SITES, Family

LLAMA = Family(name="llama", sites=DECODER_SITES)
