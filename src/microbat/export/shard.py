"""One shard of a checkpoint folder: a block's codes, scales, transforms, clip ratios and float tensors, in safetensors.

Names inside a shard: ``<layer>.weight_packed`` / ``.weight`` and ``<layer>.weight_scale`` as in compressed-tensors
(:mod:`microbat.formats.packing`), those of experts as ``mlp.experts.<number>.gate_proj.weight_packed``, one tensor [N, K] each;
``<block>.sites.<site>.transform.<parameter>`` and ``<block>.sites.<site>.clip`` [G, 2]
for what compressed-tensors cannot express. ``<layer>.bias`` is there for layers without a bias too, where calibration gave them
one; the shard's metadata lists those. A shard's metadata says which site has which transform, so that it can be
read alone, and the digest of each of its tensors, so that what was altered is refused by name.
"""

# Shapes: N out, K in, G blocks along K.

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microbat.export.schema import check_description
from microbat.formats.block import BlockFormat, QTensor
from microbat.formats.composite import Composite, format_name, pack_parts, unpack_parts
from microbat.formats.packing import check, pack, unpack
from microbat.kv import KVQuantizer
from microbat.linear import Activation, QuantBlock, QuantSite
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import Residual
from microbat.registry import instances, pick
from microbat.transforms.base import Transform, rebuilt

OUTSIDE: dict[str, Any] = {
    "name": "",
    "sites": [],
}  # the shard of what is outside all blocks, where it says nothing of itself


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """A block as read from its shard: the quantized part, and its float tensors by name inside the block."""

    quantized: QuantBlock
    floats: dict[str, Tensor]


def write_block(path: Path, name: str, block: QuantBlock, floats: dict[str, Tensor]) -> None:
    """Write one block's shard whole or not at all. ``floats`` are its other tensors, by name inside the block."""
    stacks = {key: len(value) for key, value in floats.items() if value.dim() == 3}  # of experts that stay in float
    inside = _inside(name)
    tensors = {f"{inside}{key}": value for key, value in floats.items() if key not in stacks}
    for key in stacks:
        tensors |= {f"{inside}{own}": matrix for own, matrix in zip(_each(key, stacks[key]), floats[key], strict=True)}
    sites = []
    for site in block.sites:
        prefix = f"{inside}sites.{site.name}"
        entry: dict[str, Any] = {"name": site.name, "consumers": list(site.consumers)}
        if site.transform is not None:
            entry["transform"] = site.transform.stored()
            tensors |= {f"{prefix}.transform.{key}": t for key, t in site.transform.state_dict().items()}
        if site.quantizer is not None:
            entry["activation"] = _describe(site.quantizer)
            if isinstance(site.quantizer, Clip):
                tensors[f"{prefix}.clip"] = site.quantizer.ratios
        for layer in site.consumers:
            q = block.weights[layer]
            entry.setdefault("weights", {})[layer] = {"format": format_name(q), "shape": list(q.shape)}
            if isinstance(q, Composite):
                entry["weights"][layer]["parts"] = [[part.format.name, part.shape[-1]] for part in q.parts]
            matrices = q.unstack() if len(q.shape) == 3 else [q]
            for own, matrix in zip(stored_paths(layer, q.shape), matrices, strict=True):
                stored = pack_parts(matrix) if isinstance(matrix, Composite) else pack(matrix)
                tensors |= {f"{inside}{own}.{key}": t for key, t in stored.items()}
        sites.append(entry)
    description: dict[str, Any] = {"name": name, "sites": sites, **({"experts": stacks} if stacks else {})}
    if block.biases:
        description["biases"] = sorted(block.biases)
        tensors |= {f"{inside}{path}.bias": bias for path, bias in block.biases.items()}
    if block.kv is not None:
        kv, prefix = block.kv, f"{inside}kv"
        description["kv"] = {"attention": block.attention}
        for role, quantizer in (("key", kv.key), ("value", kv.value)):
            description["kv"][role] = _describe(quantizer)
            if isinstance(quantizer, Clip):
                tensors[f"{prefix}.{role}_clip"] = quantizer.ratios
        if kv.transform is not None:
            description["kv"]["transform"] = kv.transform.stored()
            tensors |= {f"{prefix}.transform.{key}": t for key, t in kv.transform.state_dict().items()}
    write_shard(path, tensors, description)


def _inside(name: str) -> str:
    """What the names of a shard's tensors begin with: the block's own; nothing in the shard of what is outside all blocks."""
    return f"{name}." if name else ""


def stored_paths(layer: str, shape: Sequence[int]) -> list[str]:
    """Paths under which the weight of ``layer`` is stored: its own, or for experts [E, N, K] one of each."""
    return [layer] if len(shape) == 2 else [own.removesuffix(".weight") for own in _each(f"{layer}.weight", shape[0])]


def _each(key: str, num_experts: int) -> list[str]:
    """The names of a tensor ``mlp.experts.gate_proj.weight``, expert by expert: ``mlp.experts.0.gate_proj.weight`` ..."""
    parent, layer, kind = key.rsplit(".", 2)
    return [f"{parent}.{expert}.{layer}.{kind}" for expert in range(num_experts)]


def _describe(quantizer: Activation) -> dict[str, Any]:
    if isinstance(quantizer, Mixed):
        groups = zip(quantizer.parts, quantizer.widths, strict=True)
        return {"parts": [{**_describe(part), "width": width} for part, width in groups]}
    if isinstance(quantizer, Residual):
        return {**_describe(quantizer.inner), "residual_channels": quantizer.channels}
    if isinstance(quantizer, Clip):
        return {**_describe(quantizer.inner), **({"clips_whole": True} if quantizer.whole else {})}
    return {"format": quantizer.format.name, "scale_rule": quantizer.rule}


def read_block(path: Path) -> StoredBlock:
    """The block in one shard, alone.

    Raises ValueError, with the shard's and the tensor's name, for a tensor that is missing, altered, of another shape
    than the shard says, or holds codes or scales that mean no number.
    """
    description, tensors = read_shard(path)
    with reading(path):
        return _block_of(description, tensors, path)


def _block_of(description: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> StoredBlock:
    description = description or OUTSIDE
    prefix = _inside(description["name"])
    tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    formats, weights = instances("microbat.formats", BlockFormat), {}
    for key, num_experts in description.get("experts", {}).items():
        tensors[key] = torch.stack([tensors.pop(own) for own in _each(key, num_experts)])
    for entry in description["sites"]:
        for layer, stored in entry["weights"].items():
            names = [f"{n}.{k}" for n in range(len(stored.get("parts", ()))) for k in PACKED] or PACKED
            read: list[Any] = []
            for own in stored_paths(layer, stored["shape"]):
                parts = {k: tensors.pop(f"{own}.{k}") for k in names if f"{own}.{k}" in tensors}
                try:
                    read.append(_read_weight(stored, parts, formats))
                except (KeyError, RuntimeError, ValueError) as error:
                    raise ValueError(
                        f"shard {path}: {prefix}{own} does not hold {stored['format']} codes ({error})"
                    ) from error
            weights[layer] = type(read[0]).stack(read) if len(stored["shape"]) == 3 else read[0]
    if prefix:  # each tensor that is kept as it was read would keep its block's whole shard in memory
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    sites = [_read_site(entry, tensors, formats) for entry in description["sites"]]
    biases = {layer: tensors[f"{layer}.bias"] for layer in description.get("biases", ())}
    quantized = QuantBlock(sites=tuple(sites), weights=weights, biases=biases)
    if "kv" in description:
        kv = _read_kv(description["kv"], tensors, formats)
        quantized = dataclasses.replace(quantized, kv=kv, attention=description["kv"]["attention"])
    return StoredBlock(quantized=quantized, floats=tensors)


def given_biases(path: Path) -> list[str]:
    """Paths, inside its block, of the linear layers that calibration gave a bias; no tensor is read."""
    return described(path).get("biases", [])


def quantized_layers(path: Path) -> list[str]:
    """Paths, inside its block, of the linear layers whose codes a shard holds; no tensor is read."""
    return [layer for entry in described(path)["sites"] for layer in entry["weights"]]


def described(path: Path) -> dict[str, Any]:
    """What a shard says of itself; no tensor is read."""
    from safetensors import safe_open

    with reading(path), safe_open(path, framework="pt") as file:
        return _description(path, file)[0] or OUTSIDE


def _description(path: Path, file: Any) -> tuple[dict[str, Any], dict[str, str] | None]:
    """What an opened shard says of itself, checked; the digests of its tensors (folders from before digests: None)."""
    description = json.loads((file.metadata() or {}).get("microbat", "{}"))
    check_description(description, path)
    digests = description.pop("sha256", None)
    return description, digests


PACKED = ("weight_packed", "weight", "weight_scale", "weight_global_scale", "weight_tensor_scale")


def _read_weight(
    stored: dict[str, Any], parts: dict[str, Tensor], formats: dict[str, BlockFormat]
) -> QTensor | Composite:
    """The codes of a weight, or of one expert's, checked; KeyError, RuntimeError and ValueError where they are not what
    ``stored`` says."""
    shape = tuple(stored["shape"][-2:])
    if "parts" in stored:
        mixed = unpack_parts(parts, [(pick("format", name, formats), width) for name, width in stored["parts"]])
        if tuple(mixed.shape) != shape:
            raise ValueError(f"codes are {tuple(mixed.shape)} for a tensor of {shape}")
        return mixed
    q = unpack(parts, pick("format", stored["format"], formats), shape[-1])
    check(q, shape)
    return q


def _read_site(entry: dict[str, Any], tensors: dict[str, Tensor], formats: dict[str, BlockFormat]) -> QuantSite:
    own = _take(tensors, f"sites.{entry['name']}.")
    transform = _read_transform(entry["transform"], own) if "transform" in entry else None
    quantizer = _read_quantizer(entry["activation"], own.get("clip"), formats) if "activation" in entry else None
    return QuantSite(name=entry["name"], consumers=tuple(entry["consumers"]), transform=transform, quantizer=quantizer)


def _read_kv(entry: dict[str, Any], tensors: dict[str, Tensor], formats: dict[str, BlockFormat]) -> KVQuantizer:
    own = _take(tensors, "kv.")
    key, value = (_read_quantizer(entry[role], own.get(f"{role}_clip"), formats) for role in ("key", "value"))
    return KVQuantizer(key, value, _read_transform(entry["transform"], own) if "transform" in entry else None)


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _read_transform(entry: dict[str, Any], own: dict[str, Tensor]) -> Transform:
    transform = rebuilt(entry)
    transform.load_state_dict(_take(dict(own), "transform."))
    return transform.requires_grad_(False)


def _read_quantizer(entry: dict[str, Any], clip: Tensor | None, formats: dict[str, BlockFormat]) -> Activation:
    if "parts" in entry:
        parts = tuple(AbsMax(format=pick("format", p["format"], formats), rule=p["scale_rule"]) for p in entry["parts"])
        return Mixed(parts=parts, widths=tuple(part["width"] for part in entry["parts"]))
    quantizer = AbsMax(format=pick("format", entry["format"], formats), rule=entry["scale_rule"])
    if "residual_channels" in entry:
        return Residual(inner=quantizer, channels=entry["residual_channels"])
    return quantizer if clip is None else Clip(quantizer, clip, whole=entry.get("clips_whole", False))


def float_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of an installed block that are not part of its quantized sites."""
    return {key: t for key, t in module.state_dict().items() if not is_quantizers(key)}


def is_quantizers(key: str) -> bool:
    """Whether an installed block's tensor of this name belongs to its quantizers: stored elsewhere in the shard."""
    return ".site." in key or ".kv." in key


def write_other(path: Path, tensors: dict[str, Tensor], outside: QuantBlock) -> None:
    """Write the shard of everything outside the blocks: a block whose paths are full names."""
    write_block(path, "", outside, tensors)


def check_fit(block: nn.Module, stored: StoredBlock, shard: Path) -> None:
    """Raise ValueError, naming tensor and shard, where a stored tensor is not of the shape that the config gives it, or a
    float one holds NaN or Inf.

    ``block`` is the float block of the skeleton; what it lacks or has too much is left to whoever fills it.
    """
    for path in stored.quantized.weights:
        shape, wanted = stored.quantized.shape(path), tuple(block.get_submodule(path).weight.shape)
        if shape != wanted:
            raise ValueError(f"shard {shard}: {path} is {shape}; config.json makes it {wanted}")
    for path, bias in stored.quantized.biases.items():
        if tuple(bias.shape) != stored.quantized.shape(path)[:1]:
            raise ValueError(f"shard {shard}: {path}.bias is {tuple(bias.shape)}, not one number a row of the weight")
    parameters = dict(block.named_parameters())
    for name, tensor in stored.floats.items():
        if name in parameters and tensor.shape != parameters[name].shape:
            wanted = tuple(parameters[name].shape)
            raise ValueError(f"shard {shard}: {name} is {tuple(tensor.shape)}; config.json makes it {wanted}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"shard {shard}: {name} holds NaN or Inf")


def write_shard(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    content = {**description, "sha256": {k: digest(t) for k, t in sorted(tensors.items())}}
    temporary = path.with_suffix(".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    # One key of metadata at most: safetensors writes several in an order that changes from run to run.
    save_file(tensors, temporary, {"microbat": json.dumps(content)})
    temporary.chmod(mode)  # safetensors leaves its files to their owner alone; a server may be somebody else
    os.replace(temporary, path)


def read_shard(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A shard's description and its tensors by full name; ValueError for one that is missing, unknown or altered."""
    from safetensors import safe_open

    with reading(path), safe_open(path, framework="pt") as file:
        description, digests = _description(path, file)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name in sorted(digests.keys() | tensors.keys()) if digests else ():
        if name not in tensors:
            raise ValueError(f"shard {path} lacks tensor {name}")
        if name not in digests:
            raise ValueError(f"shard {path} has a tensor {name} that was not written with it")
        if digest(tensors[name]) != digests[name]:
            raise ValueError(f"shard {path}: tensor {name} was altered (its digest is not the one that was written)")
    return description, tensors


def digest(tensor: Tensor) -> str:
    """The first 64 bits of SHA-256 over a CPU tensor's type, shape and bytes, in hexadecimal."""
    state = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()[:16]


class reading:
    """Turns the errors of a damaged shard into one that names it."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        from safetensors import SafetensorError

        damage = SafetensorError | OSError | KeyError | TypeError | AttributeError | RuntimeError | json.JSONDecodeError
        if isinstance(error, damage):
            raise ValueError(f"shard {self.path} cannot be read ({error}); is it truncated or damaged?") from error
