"""Qwen2.5-VL: a vision tower of RMSNorms and SwiGLU, most of its blocks with attention in windows, before a Qwen2."""

from microbat.models.base import DECODER_SITES, Family, Inner, Site, Stack

# Its stream could be rotated offline, through the patches' convolution and the merger; methods rotate online, as in Qwen3-VL.
VISION_SITES = (
    Site(name="qkv", producer="norm1", consumers=("attn.qkv",), normed=True),
    Site(name="o", producer=None, consumers=("attn.proj",)),  # attn.qkv makes queries and keys as well
    Site(name="up", producer="norm2", consumers=("mlp.gate_proj", "mlp.up_proj"), normed=True),
    Site(name="down", producer="mlp.up_proj", consumers=("mlp.down_proj",), gated=True),
)
QWEN2_5_VL_VISION = Stack(
    sites=VISION_SITES,
    attention="attn",
    blocks="model.visual.blocks",
    rotary="model.visual.rotary_pos_emb",
    config="vision_config",
    rotates=False,
    caches=False,
    sequences=False,
    inner=Inner(makers=("mlp.gate_proj", "mlp.up_proj"), reader="mlp.down_proj"),
)
QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    sites=DECODER_SITES,
    blocks="model.language_model.layers",
    rotary="model.language_model.rotary_emb",
    config="text_config",
    embedding="model.language_model.embed_tokens",
    norm="model.language_model.norm",
    towers=(QWEN2_5_VL_VISION,),
    others=("model.visual.patch_embed", "model.visual.merger"),
    feeds=(r"model\.visual\.merger\.mlp\.2",),
    auto="AutoModelForImageTextToText",
    stored=(
        ("visual.", "model.visual."),
        *((f"model.{name}.", f"model.language_model.{name}.") for name in ("embed_tokens", "layers", "norm")),
    ),
)
