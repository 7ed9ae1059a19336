"""The layout of compressed-tensors, which transformers, vLLM and others load: a microbat folder written again in it.

Bits are moved, never rounded: the codes and scales that calibration chose are what the engine reads. Per linear layer
``P``, byte for byte what compressed-tensors 0.17 to 0.20 writes for the same codes:

==================  ==========================  =====================================================================
microbat            their format                tensors
==================  ==========================  =====================================================================
mxfp4               mxfp4-pack-quantized        P.weight_packed uint8 [N, K/2], P.weight_scale uint8 [N, K/32]
mxfp6_e2m3          mxfp6-pack-quantized        P.weight_packed uint8 [N, 3K/4], P.weight_scale uint8 [N, K/32]; from 0.20
mxfp8_e4m3          mxfp8-quantized             P.weight float8_e4m3fn [N, K], P.weight_scale uint8 [N, K/32]
nvfp4               nvfp4-pack-quantized        P.weight_packed uint8 [N, K/2], P.weight_scale float8_e4m3fn [N, K/16],
                                                P.weight_global_scale float32 [1], the reciprocal of our tensor scale
int4                pack-quantized              P.weight_packed int32 [N, K bits/32] of code + 2^(bits-1), first lowest;
                                                P.weight_scale bfloat16 [N, K/32], P.weight_shape int64 [2]
int4_row, int8      pack-quantized              the same, P.weight_scale float32 [N, 1]: strategy "channel"
the same two,       int-quantized               P.weight int8 [N, K], a byte a code, P.weight_scale float32 [N, 1]; both say
int8 inputs                                     num_bits 8, for which engines have a product of integers
==================  ==========================  =====================================================================

Which of these an engine computes as calibrated is :mod:`microbat.export.targets`'s to say.
"""

# Shapes: N out, K in, G blocks along K.

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microbat.documents import read_json, write_json
from microbat.experts import ExpertLinear
from microbat.export import folder as folders
from microbat.export.folder import read_checkpoint, read_contract
from microbat.export.shard import StoredBlock, digest, read_block
from microbat.export.targets import LAYOUT, reasons_against, target_of
from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.element import BF16, E2M1, E4M3, E8M0
from microbat.formats.packing import pack, pack_bits, unpack, unpack_bits
from microbat.linear import QuantBlock, QuantSite
from microbat.models.base import Family
from microbat.models.checkpoint import WEIGHTS_INDEX, Checkpoint
from microbat.quantizers.base import AbsMax
from microbat.registry import instances, pick

PROVENANCE = "microbat.json"
SCHEMA = "0.17.0"  # the oldest version of compressed-tensors that reads what is written here
INTEGERS = ("int4", "int4_row", "int8")
TENSORS = ("weight", "weight_packed", "weight_scale", "weight_global_scale", "weight_shape")
NEGATIVE_ZERO = 0b1000  # of E2M1
SCALE_DTYPES = {E8M0: "torch.uint8", E4M3: "torch.float8_e4m3fn"}  # others: the model's own
FORMATS = {
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6_e2m3": "mxfp6-pack-quantized",
    "mxfp8_e4m3": "mxfp8-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "int4": "pack-quantized",
    "int4_row": "pack-quantized",
    "int8": "pack-quantized",
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export says about itself in ``microbat.json``. ``weights`` and ``activations`` are the folder's: format and
    scale rule; ``codes``: linear layer -> digest of the codes and scales that calibration chose; ``tensors``: stored
    tensor -> digest of its bytes; ``source``: the recipe.json of the folder."""

    target: str
    weights: dict[str, str]
    activations: dict[str, str] | None
    source: dict[str, Any]
    codes: dict[str, str]
    tensors: dict[str, str]


def export(folder: str | Path, out: str | Path, *, target: str) -> Path:
    """Write the microbat folder ``folder`` as a compressed-tensors checkpoint ``out`` for an engine; return ``out``.

    Block by block, so that memory holds one. Raises ValueError, before anything is written, where the engine would drop
    or compute otherwise than calibrated: with every reason and the way out.
    """
    folder, out = Path(folder), Path(out)
    engine = target_of(target, LAYOUT)
    contract, checkpoint = read_contract(folder), read_checkpoint(folder)
    if out.exists():
        raise ValueError(f"output folder {out} exists; choose another or remove it")
    family, shards = checkpoint.family, [folder / folders.block_shard(i) for i in range(len(checkpoint.blocks))]
    other = read_block(folder / folders.OTHER_SHARD)
    if reasons := reasons_against(engine, contract, family, map(read_block, shards), other.quantized):
        raise ValueError(
            f"{folder} cannot be served by {engine.title} as it was calibrated:\n- " + "\n- ".join(reasons)
        )
    weights, activations = _formats(contract["weights"], contract["activations"])
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    codes: dict[str, str] = {}
    digests: dict[str, str] = {}
    for index, shard in enumerate(shards):
        name, stored = checkpoint.blocks[index][1], read_block(shard)
        tensors = _block_tensors(stored, quantized_inputs=activations is not None)
        codes |= {f"{name}.{path}": codes_digest(q) for path, q in stored.quantized.weights.items()}
        digests |= {f"{name}.{key}": digest(tensor) for key, tensor in tensors.items()}
        written = {f"{name}.{key}": tensor for key, tensor in family.stored_form(tensors).items()}
        _save(partial, f"model-{index + 1:05d}-of-{len(shards) + 1:05d}.safetensors", written, weight_map)
    digests |= {key: digest(tensor) for key, tensor in other.floats.items()}
    last = f"model-{len(shards) + 1:05d}-of-{len(shards) + 1:05d}.safetensors"
    _save(partial, last, other.floats, weight_map)
    total = sum(file.stat().st_size for file in partial.iterdir())
    write_json(
        partial / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )
    for pattern in (*folders.COPIED, folders.PROOF):
        for file in folder.glob(pattern):
            shutil.copy(file, partial / file.name)
    provenance = Exported(
        target=target,
        weights=contract["weights"],
        activations=contract["activations"],
        source=read_json(folder / "recipe.json"),
        codes=codes,
        tensors=digests,
    )
    write_json(partial / PROVENANCE, {"microbat": version("microbat"), **vars(provenance)})
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in folders.WITHOUT_US}
    config["quantization_config"] = quantization_config(weights, activations, _float_layers(checkpoint, set(codes)))
    in_scales_type = weights.scale_element == BF16 and any(f".{family.experts}." in layer for layer in codes)
    if weights.name not in INTEGERS or in_scales_type:  # experts, which transformers decodes on its own
        config["dtype"] = "bfloat16"  # what these are unpacked to, whatever the model's own is
    write_json(partial / "config.json", config)
    os.rename(partial, out)
    return out


def read_exported(folder: Path) -> Exported:
    """What ``folder``'s ``microbat.json`` says; ValueError where it is not an export of ours."""
    file = folder / PROVENANCE
    if not file.is_file():
        raise ValueError(f"{folder} has no {PROVENANCE}: it is not a folder that microbat exported")
    content = read_json(file)
    try:
        return Exported(**{field.name: content[field.name] for field in dataclasses.fields(Exported)})
    except KeyError as error:
        raise ValueError(f"{file} is not what microbat writes (it lacks {error})") from error


def is_exported(path: Path) -> bool:
    """Whether ``path`` is an export of ours."""
    return (path / PROVENANCE).is_file()


def read_blocks(folder: Path) -> Iterator[StoredBlock]:
    """The blocks of an exported folder, decoded.

    Raises ValueError, with the names of file and tensor, for one that is missing or altered, and for codes that are not
    those that calibration chose.
    """
    said, checkpoint = read_exported(folder), Checkpoint(folder)
    weights, activations = _formats(said.weights, said.activations)
    _check_tensors(folder, said, checkpoint)
    quantizer = AbsMax(format=activations, rule=said.activations["scale_rule"]) if said.activations else None
    for stack, name in checkpoint.blocks:
        tensors = checkpoint.tensors(name)
        codes = {}
        for path in [key.removeprefix(f"{name}.") for key in said.codes if key.startswith(f"{name}.")]:
            own = {key: tensors.pop(f"{path}.{key}") for key in TENSORS if f"{path}.{key}" in tensors}
            codes[path] = from_tensors(own, weights, quantized_inputs=activations is not None)
            if codes_digest(codes[path]) != said.codes[f"{name}.{path}"]:
                raise ValueError(f"{folder}: {name}.{path} does not decode to the codes that calibration chose")
        sites = tuple(
            QuantSite(name=site.name, consumers=kept, transform=None, quantizer=quantizer)
            for site in stack.sites
            if (kept := tuple(path for path in site.consumers if path in codes))
        )
        yield StoredBlock(quantized=QuantBlock(sites=sites, weights=codes), floats=tensors)


def _check_tensors(folder: Path, said: Exported, checkpoint: Checkpoint) -> None:
    for name in sorted(said.tensors.keys() | set(checkpoint.names)):
        if name not in checkpoint.names:
            raise ValueError(f"{folder} lacks tensor {name}")
        if name not in said.tensors or digest(checkpoint.tensor(name)) != said.tensors[name]:
            raise ValueError(f"{checkpoint.file_of(name)}: tensor {name} is not the one that was exported")


def codes_digest(q: QTensor) -> str:
    """What tells the codes and block scales of ``q`` from any others, whatever layout they are stored in."""
    return digest(torch.cat([_codes(q).flatten(), q.scales.contiguous().flatten().view(torch.uint8)]))


def _codes(q: QTensor) -> Tensor:
    """The codes of ``q``; those of E2M1 with its second zero, -0, as 0, as compressed-tensors writes it on a CPU."""
    return torch.where(q.codes == NEGATIVE_ZERO, 0, q.codes) if q.format.element == E2M1 else q.codes


def to_tensors(q: QTensor, *, quantized_inputs: bool) -> dict[str, Tensor]:
    """``q`` [N, K] as the tensors that compressed-tensors stores; integers depend on what they meet. Of experts [E, N, K]
    those of each, stacked."""
    if len(q.shape) == 3:
        each = [to_tensors(one, quantized_inputs=quantized_inputs) for one in q.unstack()]
        return {key: torch.stack([tensors[key] for tensors in each]) for key in each[0]}
    tensors = pack(dataclasses.replace(q, codes=_codes(q)))
    if q.format.name not in INTEGERS:
        return {key: tensor for key, tensor in tensors.items() if key != "weight_tensor_scale"}
    bits = q.format.element.bits
    shifted = q.codes ^ (1 << (bits - 1))  # two's complement to code + 2^(bits-1)
    if quantized_inputs:
        codes = (shifted.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        return {"weight": codes, "weight_scale": tensors["weight_scale"]}
    packed = shifted if bits == 8 else pack_bits(shifted, bits)
    packed = nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(torch.int32)
    return {
        "weight_packed": packed,
        "weight_scale": tensors["weight_scale"],
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }


def from_tensors(tensors: dict[str, Tensor], format: BlockFormat, *, quantized_inputs: bool) -> QTensor:
    """The inverse of :func:`to_tensors`; the tensor scale is that of the stored reciprocal. KeyError for what is missing."""
    tensors = dict(tensors)
    stored = tensors.get("weight_packed", tensors.get("weight"))
    if stored is not None and stored.dim() == 3:
        each = ({key: tensor[expert] for key, tensor in tensors.items()} for expert in range(len(stored)))
        return QTensor.stack([from_tensors(one, format, quantized_inputs=quantized_inputs) for one in each])
    if format.name in INTEGERS:
        bits = format.element.bits
        if quantized_inputs:
            codes = tensors["weight"].view(torch.uint8) & ((1 << bits) - 1)
        else:
            stored, width = tensors["weight_packed"].view(torch.uint8), int(tensors["weight_shape"][-1])
            codes = (stored[..., :width] if bits == 8 else unpack_bits(stored, bits, width)) ^ (1 << (bits - 1))
        return QTensor(format=format, codes=codes, scales=tensors["weight_scale"].to(torch.float32))
    if format.has_tensor_scale:
        tensors["weight_tensor_scale"] = tensors["weight_global_scale"].reciprocal()
    if "weight" in tensors:
        return unpack(tensors, format, tensors["weight"].shape[-1])
    return unpack(tensors, format, tensors["weight_packed"].shape[-1] * 8 // format.element.bits)


def quantization_config(weights: BlockFormat, activations: BlockFormat | None, ignore: list[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json, in the words that every supported version of compressed-tensors takes."""
    arguments, format = _arguments(weights, dynamic=False), FORMATS[weights.name]
    if weights.name in INTEGERS and activations is not None:
        arguments["num_bits"], format = 8, "int-quantized"
    group = {
        "targets": ["Linear"],
        "weights": arguments,
        "input_activations": activations and _arguments(activations, dynamic=True),
        "output_activations": None,
        "format": format,
    }
    return {
        "quant_method": "compressed-tensors",
        "version": SCHEMA,
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _arguments(format: BlockFormat, *, dynamic: bool) -> dict[str, Any]:
    """A format in the words of their QuantizationArgs; ``dynamic``: of activations, scaled as they come."""
    whole_row = "token" if dynamic else "channel"
    grouped = "tensor_group" if format.has_tensor_scale else "group"
    arguments = {
        "num_bits": format.element.bits,
        "type": "int" if format.element.is_fixed_point else "float",
        "symmetric": True,
        "group_size": format.block,
        "strategy": whole_row if format.block is None else grouped,
        "dynamic": dynamic,
    }
    if format.scale_element in SCALE_DTYPES:
        arguments["scale_dtype"] = SCALE_DTYPES[format.scale_element]
    return arguments


def _formats(weights: dict[str, str], activations: dict[str, str] | None) -> tuple[BlockFormat, BlockFormat | None]:
    known = instances("microbat.formats", BlockFormat)
    return pick("format", weights["format"], known), activations and pick("format", activations["format"], known)


def _block_tensors(stored: StoredBlock, *, quantized_inputs: bool) -> dict[str, Tensor]:
    """All tensors of a block by their names in it."""
    tensors = dict(stored.floats)
    for path, q in stored.quantized.weights.items():
        own = to_tensors(q, quantized_inputs=quantized_inputs)
        tensors |= {f"{path}.{key}": tensor for key, tensor in own.items()}
    return tensors


def _float_layers(checkpoint: Checkpoint, quantized: set[str]) -> list[str]:
    """Full names, as stored, of the linear layers and routers that are not among ``quantized``; a pattern for all experts."""
    family, names = checkpoint.family, []
    routers = {f"{block}.{path}" for _, block in checkpoint.blocks for site in family.sites for path in site.readers}
    for name, module in checkpoint.skeleton().named_modules():
        linear = isinstance(module, nn.Linear | ExpertLinear) or name in routers
        if linear and name not in quantized:
            names.append(_as_stored(name, family))
    return names


def _as_stored(layer: str, family: Family) -> str:
    """The full name of a float layer in the words of quantization_config's ``ignore``."""
    block, path = re.fullmatch(rf"({re.escape(family.blocks)}\.\d+\.|)(.*)", layer).groups()
    stored = next((one.stored for one in family.layouts if one.held == f"{path}.weight"), path).removesuffix(".weight")
    name = block + stored if block else layer
    return name if "*" not in name else "re:" + re.escape(name).replace(r"\*", r"\d+") + "$"


def _save(folder: Path, file: str, tensors: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file, {"format": "pt"})
    weight_map |= dict.fromkeys(tensors, file)
