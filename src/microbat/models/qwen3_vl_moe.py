"""Qwen3-VL, mixture of experts: the tower of Qwen3-VL before a language model as in Qwen3-MoE, whose checkpoints store a block's
experts as two tensors, gate and up [E, K, 2 N] in one and down [E, N, K]."""

import dataclasses

from microbat.models.base import DECODER_SITES, EXPERT_SITES, EXPERT_WRITERS
from microbat.models.layout import Layout
from microbat.models.qwen3_vl import QWEN3_VL

BOTH = "mlp.experts.gate_up_proj"
QWEN3_VL_MOE = dataclasses.replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    sites=(*DECODER_SITES, *EXPERT_SITES),
    writers=EXPERT_WRITERS,
    experts="mlp.experts",
    layouts=(
        Layout(held="mlp.experts.gate_proj.weight", stored=BOTH, inputs="hidden_size", half=0),
        Layout(held="mlp.experts.up_proj.weight", stored=BOTH, inputs="hidden_size", half=1),
        Layout(held="mlp.experts.down_proj.weight", stored="mlp.experts.down_proj", inputs="moe_intermediate_size"),
    ),
)
