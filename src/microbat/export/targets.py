"""What engines compute from a compressed-tensors checkpoint, as data; and why a folder does not survive the trip to one.

A target says, for each pair of weight and activation formats, either the scale rules of activations under which the
engine computes what calibration saw (none for 16-bit activations), or why it does not and what to do instead. Pairs that
it does not list it cannot serve. New engines are new constants here.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from microbat.export.shard import StoredBlock
from microbat.linear import QuantBlock, QuantSite
from microbat.models.base import Family
from microbat.quantizers.clip import Clip
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import Residual
from microbat.registry import pick

LAYOUT = "compressed-tensors"
AS_IT_IS = "microbat"
Served = tuple[str, ...] | str


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine's profile. ``engine``: its name in :mod:`microbat.engines`. ``layout``: what it reads. ``fuses``: it multiplies
    the layers that share an input at once, with one scheme and one tensor scale. ``towers``: it was tried with folders whose
    vision tower is quantized. ``serves``: (weights, activations) -> the
    activations' scale rules, or the reason against the pair; empty where the layout is microbat's own, which has no limits.
    ``experts``: the same where experts have these formats; None and None: they are in float."""

    name: str
    title: str
    engine: str
    serves: dict[tuple[str, str | None], Served]
    experts: dict[tuple[str | None, str | None], Served] = field(default_factory=dict)
    fuses: bool = False
    towers: bool = False
    layout: str = LAYOUT


ANY_RULE: Served = ()
CONSTANT_NVFP4 = (
    "NVFP4 activations: engines multiply by a constant that is stored with the weights, microbat scales each call by its own "
    "largest magnitude; quantize with A16 (W4A16:nvfp4), or with mxfp4, or take --target vllm-plugin"
)
GROUPS = (
    "int4 weights in groups of 32 with int8 activations: vLLM's kernels for them (Humming on GPUs, KleidiAI on Arm) have not "
    "been verified; quantize with --scheme W4A8:int4_row,int8, a scale for each row, or take --target vllm-plugin"
)
BY_127 = (
    "INT8 activations: compressed-tensors divides a token's largest magnitude by 127.5, calibration by 127; "
    "take --target vllm, which divides by 127{}"
)
EVERY_GPU: dict[tuple[str, str | None], Served] = {
    ("int4", None): ANY_RULE,
    ("int4", "int8"): GROUPS,
    ("int4_row", None): ANY_RULE,
    ("int4_row", "int8"): ("absmax",),
    ("int8", None): ANY_RULE,
    ("int8", "int8"): ("absmax",),
    ("nvfp4", None): ANY_RULE,
    ("nvfp4", "nvfp4"): CONSTANT_NVFP4,
}
BY_GPU = "depends on the GPU in vLLM: name it, --target vllm-hopper (and older) or vllm-blackwell"
WITHOUT_ACTIVATIONS = (
    "up to Hopper, vLLM computes MX checkpoints with 16-bit activations; quantize with A16 (--scheme W4A16), "
    "or take --target vllm-blackwell"
)
KEEP = (
    "keep the microbat folder, which microbat.load runs, transformers after `import microbat`, and vLLM where microbat is "
    "installed (--target vllm-plugin)"
)
NO_EXPERTS = f"{{title}} has not been verified to compute them as calibrated; {KEEP}"
IN_FLOAT = (None, None)
# transformers 5.23 decodes experts when it loads them, whatever the checkpoint says of their activations.
# vLLM's CompressedTensorsWNA16MoEMethod: Marlin and its like, integers times 16-bit activations, one scheme for all three layers.
VLLM_EXPERTS: dict[tuple[str | None, str | None], Served] = dict.fromkeys(
    [IN_FLOAT, ("int4", None), ("int4_row", None), ("int8", None)], ANY_RULE
)
DECODED = f"transformers turns experts into floats and leaves their activations in 16 bits; quantize with A16 (W4A16), or {KEEP}"

TRANSFORMERS = Target(
    name="transformers",
    title="transformers",
    engine="transformers",
    towers=True,
    serves={
        ("mxfp4", None): ANY_RULE,
        ("mxfp4", "mxfp4"): ("even",),
        ("mxfp4", "mxfp8_e4m3"): ("rceil",),
        ("mxfp6_e2m3", None): ANY_RULE,
        ("mxfp6_e2m3", "mxfp8_e4m3"): ("rceil",),
        ("mxfp8_e4m3", None): ANY_RULE,
        ("mxfp8_e4m3", "mxfp8_e4m3"): ("rceil",),
        ("nvfp4", None): ANY_RULE,
        ("nvfp4", "nvfp4"): CONSTANT_NVFP4,
        ("int4", None): ANY_RULE,
        ("int4", "int8"): BY_127.format(", with --scheme W4A8:int4_row,int8, or quantize with A16 (W4A16:int4)"),
        ("int4_row", None): ANY_RULE,
        ("int4_row", "int8"): BY_127.format(", or quantize with A16 (W4A16:int4_row)"),
        ("int8", None): ANY_RULE,
        ("int8", "int8"): BY_127.format(", or quantize with A16 (W8A16:int8)"),
    },
    experts={
        **dict.fromkeys(
            [("mxfp4", None), ("mxfp6_e2m3", None), ("int4", None), ("int4_row", None), ("int8", None)], ANY_RULE
        ),
        **dict.fromkeys(
            [
                ("mxfp4", "mxfp4"),
                ("mxfp4", "mxfp8_e4m3"),
                ("mxfp6_e2m3", "mxfp8_e4m3"),
                ("mxfp8_e4m3", "mxfp8_e4m3"),
            ],
            DECODED,
        ),
        (
            "mxfp8_e4m3",
            None,
        ): "transformers does not load experts in MXFP8: it takes the exponents of their scales for the "
        "scales; quantize with W4A16 or W6A16",
        (
            "nvfp4",
            None,
        ): "transformers decodes experts in NVFP4 without their tensor scale; quantize with W4A16 (mxfp4)",
        IN_FLOAT: "experts are in float: transformers does not load such experts beside layers of compressed-tensors; quantize "
        "them too, or keep the microbat folder",
    },
)
VLLM = Target(
    name="vllm",
    title="vLLM on every GPU",
    engine="vllm",
    experts=VLLM_EXPERTS,
    fuses=True,
    serves=EVERY_GPU
    | dict.fromkeys([("mxfp4", None), ("mxfp4", "mxfp4"), ("mxfp8_e4m3", None), ("mxfp8_e4m3", "mxfp8_e4m3")], BY_GPU),
)
VLLM_HOPPER = Target(
    name="vllm-hopper",
    title="vLLM on Hopper and older GPUs",
    engine="vllm",
    experts=VLLM_EXPERTS,
    fuses=True,
    serves=EVERY_GPU
    | {
        ("mxfp4", None): ANY_RULE,
        ("mxfp4", "mxfp4"): WITHOUT_ACTIVATIONS,
        ("mxfp8_e4m3", None): ANY_RULE,
        ("mxfp8_e4m3", "mxfp8_e4m3"): WITHOUT_ACTIVATIONS,
    },
)
# FlashInfer rounds the exponent of amax / 6 (MXFP4) and amax / 448 (MXFP8) up: the rule that is called rceil here.
VLLM_BLACKWELL = Target(
    name="vllm-blackwell",
    title="vLLM on Blackwell GPUs",
    engine="vllm",
    experts=VLLM_EXPERTS,
    fuses=True,
    serves=EVERY_GPU
    | {
        ("mxfp4", None): (
            "on Blackwell vLLM quantizes the activations of W4A16 MXFP4 checkpoints too (vllm#56770); "
            "quantize with A4 (--scheme W4A4 --scale-rule rceil)"
        ),
        ("mxfp4", "mxfp4"): ("rceil",),
        ("mxfp8_e4m3", None): (
            "vLLM quantizes the activations of W8A16 MXFP8 checkpoints on Blackwell; quantize with A8 (--scheme W8A8)"
        ),
        ("mxfp8_e4m3", "mxfp8_e4m3"): ("rceil",),
    },
)
# Where llama.cpp multiplies integers (a CPU) it rounds 16-bit activations to 8 bits in blocks of 32 (Q8_0): its arithmetic,
# as bfloat16 is that of others.
LLAMA_CPP = Target(
    name="llama.cpp",
    title="llama.cpp",
    engine="llama.cpp",
    layout="gguf",
    serves={
        ("mxfp4", None): ANY_RULE,
        ("mxfp4", "mxfp4"): "llama.cpp does not quantize activations to MXFP4; quantize with A16 (--scheme W4A16)",
        ("mxfp4", "mxfp8_e4m3"): "llama.cpp does not quantize activations to MXFP8; quantize with A16 (--scheme W4A16)",
    },
)
NO_CPU_KERNEL = (
    "vLLM has no kernel for it on CPUs and does not load it; quantize with --scheme W8A8:int8 or W4A16:int4, or take "
    "--target vllm-plugin"
)
VLLM_CPU = Target(
    name="vllm-cpu",
    title="vLLM on CPUs",
    engine="vllm",
    fuses=True,
    serves={
        ("int4", None): ANY_RULE,
        ("int4", "int8"): GROUPS,
        ("int4_row", None): ANY_RULE,
        ("int4_row", "int8"): ("absmax",),
        ("int8", "int8"): ("absmax",),
    }
    | dict.fromkeys([("int8", None), ("mxfp4", None), ("mxfp4", "mxfp4"), ("mxfp8_e4m3", None)], NO_CPU_KERNEL),
    experts={
        IN_FLOAT: ANY_RULE,
        **dict.fromkeys(
            [("int4", None), ("int4_row", None)],
            f"vLLM on CPUs multiplies experts in int4 by activations of 8 bits, where there is AMX; {KEEP}",
        ),
        ("int8", "int8"): f"vLLM's kernel for experts in int8 on CPUs needs AMX and has not been run; {KEEP}",
    },
)
VLLM_PLUGIN = Target(
    name="vllm-plugin", title="vLLM with microbat's plugin", engine="vllm", layout=AS_IT_IS, fuses=True, serves={}
)
TARGETS = {
    target.name: target
    for target in (TRANSFORMERS, VLLM, VLLM_HOPPER, VLLM_BLACKWELL, VLLM_CPU, VLLM_PLUGIN, LLAMA_CPP)
}


def target_of(name: str, layout: str) -> Target:
    """The target of this name; ValueError for an unknown one and for one that reads another layout."""
    target = pick("target", name, TARGETS)
    if target.layout != layout:
        raise ValueError(f"target {name!r} reads {target.layout}, not {layout}: --format {target.layout}")
    return target


def reasons_against(
    target: Target, contract: dict[str, Any], family: Family, blocks: Iterable[StoredBlock], outside: QuantBlock
) -> list[str]:
    """Why ``target`` would not compute what the folder of ``contract``, ``blocks`` and the codes ``outside`` them does, each with
    the way out; [] if it would."""
    reasons = [*tower_reasons(target, family), *format_reasons(target, contract), *outside_reasons(target, outside)]
    found: Counter[str] = Counter()
    for stored in blocks:
        block = stored.quantized
        found.update(_expert_reasons(target, contract, family, stored))
        for site in block.sites:
            found.update(_site_reasons(target, site, block))
        if block.biases:
            found[
                f"{', '.join(block.biases)} were given a bias, for which the model's own code has no place; keep the microbat "
                "folder, or quantize without correction (--set correct=false)"
            ] += 1
        for site in (site for stack in family.stacks for site in stack.sites) if target.fuses else ():
            kept = [path for path in site.consumers if path in block.weights]
            if 0 < len(kept) < len(site.consumers):
                left = ", ".join(path for path in site.consumers if path not in kept)
                found[
                    f"{left} is in float, {', '.join(kept)} is not: the engine fuses them; ignore all of them or none"
                ] += 1
    return reasons + [f"{reason} ({count} blocks)" for reason, count in found.items()]


def tower_reasons(target: Target, family: Family) -> list[str]:
    """Those that the family alone decides."""
    if not family.towers or target.towers:
        return []
    return [
        f"{family.name} models: {target.title} was not tried with them; microbat and --target transformers run them"
    ]


def outside_reasons(target: Target, outside: QuantBlock) -> list[str]:
    """Those of layers outside the blocks."""
    if not outside.weights:
        return []
    return [
        f"{', '.join(outside.weights)}: {target.title} was not tried with quantized layers outside the blocks; microbat.load "
        "runs them, and transformers after `import microbat`, or leave them in float (without --also)"
    ]


def format_reasons(target: Target, contract: dict[str, Any]) -> list[str]:
    """Those of :func:`reasons_against` that formats and scale rules alone decide."""
    weights, activations, cache = contract["weights"], contract["activations"], contract.get("kv_cache")
    pair = weights["format"], activations and activations["format"]
    served = target.serves.get(pair, f"{pair[0]} weights with {pair[1] or '16-bit'} activations: {_offers(target)}")
    reasons = []
    if isinstance(served, str):
        reasons.append(served)
    elif activations and activations["scale_rule"] not in served:
        reasons.append(
            f"scale rule {activations['scale_rule']!r} of {pair[1]} activations: {target.title} computes "
            f"{' or '.join(map(repr, served))}; quantize with --scale-rule {served[0]}"
        )
    if cache:
        reasons.append(
            f"the cache in {cache['format']}: the engine would keep it in 16 bits; quantize with KV16, or "
            "take --target vllm-plugin"
        )
    return reasons


def _offers(target: Target) -> str:
    pairs = [f"{w} and {a or '16 bits'}" for (w, a), served in target.serves.items() if not isinstance(served, str)]
    return f"the engine has {', '.join(pairs)}"


def _expert_reasons(target: Target, contract: dict[str, Any], family: Family, stored: StoredBlock) -> list[str]:
    inside = f"{family.experts}."
    if not family.experts or not any(path.startswith(inside) for path in (*stored.quantized.weights, *stored.floats)):
        return []
    floats = [key.removesuffix(".weight") for key in stored.floats if key.startswith(inside)]
    kept = [path for path in stored.quantized.weights if path.startswith(inside)]
    if floats and kept:
        return [
            f"{', '.join(floats)} are in float, {', '.join(kept)} are not: engines take all layers of experts or none"
        ]
    apart = any("*" in layout.stored for layout in family.layouts)
    if not apart:
        fused = f"{family.name}'s checkpoints hold experts fused, for which {LAYOUT} has no place; {KEEP}"
        return [fused] if kept else []
    activations = contract["activations"]
    pair = (contract["weights"]["format"], activations and activations["format"]) if kept else IN_FLOAT
    served = target.experts.get(pair, f"experts: {NO_EXPERTS.format(title=target.title)}")
    return [served] if isinstance(served, str) else []


def _site_reasons(target: Target, site: QuantSite, block: QuantBlock) -> list[str]:
    reasons = []
    if site.transform is not None:
        reasons.append(
            f"transform {site.transform.name!r} before {', '.join(site.consumers)} runs online and would be dropped; "
            "keep the microbat folder, which transformers loads after `import microbat` and vLLM where microbat is installed "
            "(--target vllm-plugin), or take a method that folds (rtn, gptq, smoothquant)"
        )
    if isinstance(site.quantizer, Clip):
        reasons.append(
            f"the clip of the activation before {', '.join(site.consumers)} would be dropped; the same way out"
        )
    if isinstance(site.quantizer, Residual):
        reasons.append(
            f"the residual channels of the activation before {', '.join(site.consumers)}, which weights with as many more "
            "columns meet, would not be made; the same way out"
        )
    if isinstance(site.quantizer, Mixed):
        reasons.append(
            f"{', '.join(site.consumers)} hold several formats side by side, and so does their activation; the same way out"
        )
    scales = [q.tensor_scale for q in map(block.weights.get, site.consumers) if q and q.tensor_scale is not None]
    if target.fuses and any(not torch.equal(scale, scales[0]) for scale in scales):
        reasons.append(
            f"{', '.join(site.consumers)} have a tensor scale each, as earlier versions of microbat gave them: the engine fuses "
            "them and takes the largest; quantize again, which gives them one, or take --target vllm-plugin or transformers"
        )
    return reasons
