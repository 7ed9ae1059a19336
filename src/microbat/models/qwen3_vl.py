"""Qwen3-VL, dense: a vision tower of LayerNorms and GELU, DeepStack features from some of its blocks into the first blocks of a
language model as in Qwen3."""

from microbat.models.base import DECODER_SITES, Family, Inner, Site, Stack

# LayerNorm subtracts a mean and adds a bias, so no rotation passes it: methods that rotate do so online here (sheet B4, T12).
VISION_SITES = (
    Site(name="qkv", producer="norm1", consumers=("attn.qkv",), normed=True),
    Site(name="o", producer=None, consumers=("attn.proj",)),  # attn.qkv makes queries and keys as well
    Site(name="fc1", producer="norm2", consumers=("mlp.linear_fc1",), normed=True),
    Site(name="fc2", producer=None, consumers=("mlp.linear_fc2",)),
)
QWEN3_VL_VISION = Stack(
    sites=VISION_SITES,
    attention="attn",
    blocks="model.visual.blocks",
    rotary="model.visual.rotary_pos_emb",
    config="vision_config",
    taps="deepstack_visual_indexes",
    rotates=False,
    caches=False,
    sequences=False,
    inner=Inner(makers=("mlp.linear_fc1",), reader="mlp.linear_fc2"),
)
QWEN3_VL = Family(
    name="qwen3_vl",
    sites=DECODER_SITES,
    blocks="model.language_model.layers",
    rotary="model.language_model.rotary_emb",
    config="text_config",
    embedding="model.language_model.embed_tokens",
    norm="model.language_model.norm",
    towers=(QWEN3_VL_VISION,),
    others=(
        "model.visual.patch_embed",
        "model.visual.pos_embed",
        "model.visual.merger",
        "model.visual.deepstack_merger_list",
    ),
    feeds=(r"model\.visual\.merger\.linear_fc2", r"model\.visual\.deepstack_merger_list\.\d+\.linear_fc2"),
    auto="AutoModelForImageTextToText",
)
