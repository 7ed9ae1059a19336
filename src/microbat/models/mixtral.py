"""Mixtral: attention as in Llama, a router and experts in each block, stored under names of their own."""

from microbat.models.base import DECODER_SITES, EXPERT_SITES, EXPERT_WRITERS, Family
from microbat.models.layout import Layout, per_expert

MIXTRAL = Family(
    name="mixtral",
    sites=(*DECODER_SITES[:2], *EXPERT_SITES),
    writers=EXPERT_WRITERS,
    experts="mlp.experts",
    layouts=(
        *per_expert("block_sparse_moe.experts", "w1", "w3", "w2"),
        Layout(held="mlp.gate.weight", stored="block_sparse_moe.gate.weight"),
    ),
)
