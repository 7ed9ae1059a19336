"""openPangu-Embedded, dense (1B, 7B): as Llama, with biases on q, k, v and o (its config says ``bias``).

Its code is on the hub alone; it computes what transformers' Llama does with ``attention_bias``, from tensors of the same
names. The quantized folder is therefore a Llama's, which engines load without that code.

A prompt that ends in /no_think or /auto_think turns slow thinking off, or leaves the choice to the model (model card of the 7B
V1.1; the 1B is in no_think alone). Thoughts end at [unused17].
"""

from microbat.models.base import DECODER_SITES, Family, Thinking

PANGU_EMBEDDED = Family(
    name="PanguEmbedded",
    sites=DECODER_SITES,
    same_as="llama",
    renamed=(("bias", "attention_bias"),),
    thinking=Thinking(
        modes=(("no_think", " /no_think"), ("auto_think", " /auto_think"), ("slow_think", "")),
        opening="[unused16]",
        closing="[unused17]",
    ),
)
