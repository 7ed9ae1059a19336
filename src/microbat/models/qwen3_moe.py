"""Qwen3, mixture of experts: attention as in Qwen3, a router and experts in each block, or in some."""

from microbat.models.base import DECODER_SITES, EXPERT_SITES, EXPERT_WRITERS, Family
from microbat.models.layout import per_expert

QWEN3_MOE = Family(
    name="qwen3_moe",
    sites=(*DECODER_SITES, *EXPERT_SITES),
    writers=EXPERT_WRITERS,
    experts="mlp.experts",
    layouts=per_expert("mlp.experts", "gate_proj", "up_proj", "down_proj"),
)
