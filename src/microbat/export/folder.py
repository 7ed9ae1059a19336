"""microbat's own checkpoint folder: schema, writer, reader.

::

    config.json                             the model's config, with ``quantization_config`` (:mod:`microbat.export.schema`)
    microbat.safetensors.index.json         tensor name -> shard; the name keeps other readers from taking it for float
    microbat-block-000.safetensors ...      one shard a block: codes, scales, transforms, clip ratios, norms, biases
    microbat-other.safetensors              embedding, final norm, head, mergers: as a block's, paths being full names
    recipe.json report.json                 how it was made, what it cost
    proof.safetensors                       tokens, images with them, and what the calibrated model's last block made of them
    tokenizer files, generation_config.json as the model had them

While a run goes on its shards (:mod:`microbat.export.shard`) lie in ``<folder>.partial`` and become the folder by one rename
at the end.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from microbat.documents import read_json, write_json
from microbat.export.schema import CONVENTION, QUANT_METHOD, SCHEMA_VERSION, check_contract
from microbat.export.shard import described, read_shard, reading, write_shard
from microbat.models.checkpoint import Checkpoint

INDEX = "microbat.safetensors.index.json"
OTHER_SHARD = "microbat-other.safetensors"
# The entry by which transformers lets a config name the file of weights. Where microbat is imported its quantizer does; where it
# is not, from_pretrained stops with an error that ends in this sentence.
WITHOUT_US = {"transformers_weights": "`import microbat` before from_pretrained (pip install microbat)"}
PROOF = "proof.safetensors"
PROOF_TOKENS = 64
COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.jinja",
    "generation_config.json",
    "*processor_config.json",
)


def block_shard(index: int) -> str:
    return f"microbat-block-{index:03d}.safetensors"


def write_proof(path: Path, sample: dict[str, Tensor], outputs: Tensor) -> None:
    """Keep what the calibrated model's last block made [1, L, K] of ``sample``, what the model is called with by name, for
    :mod:`microbat.verify`: the first of its tokens, all where images stand among them."""
    tokens, images = sample["input_ids"], {name: t for name, t in sample.items() if name != "input_ids"}
    kept = tokens.shape[1] if images else PROOF_TOKENS
    write_shard(path, {"tokens": tokens[:, :kept], "outputs": outputs[:, :kept], **images}, {})


def read_proof(folder: Path) -> tuple[dict[str, Tensor], Tensor] | None:
    """What the model is called with (``input_ids`` int64 [1, L], and images) and the last block's outputs float32 [1, L, K];
    None for a folder from before proofs."""
    if not (folder / PROOF).is_file():
        return None
    _, tensors = read_shard(folder / PROOF)
    outputs = tensors.pop("outputs")
    return {"input_ids": tensors.pop("tokens"), **tensors}, outputs


def finish(
    partial: Path,
    folder: Path,
    source: Checkpoint,
    quantization: dict[str, Any],
    documents: dict[str, Any],
    scratch: Iterable[Path],
) -> None:
    """Turn ``partial`` into ``folder``: index, config, documents, tokenizer; drop ``scratch``; one rename at the end."""
    from safetensors import safe_open

    weight_map, total = {}, 0
    for shard in sorted(partial.glob("microbat-*.safetensors")):
        total += shard.stat().st_size
        with safe_open(shard, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard.name)
    write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    for pattern in COPIED:
        for file in source.path.glob(pattern):
            shutil.copy(file, partial / file.name)
    config = {**source.entries, **source.config_changes, **WITHOUT_US}
    contract = {"quant_method": QUANT_METHOD, "schema": SCHEMA_VERSION, **quantization, **CONVENTION}
    for name, document in documents.items():
        write_json(partial / name, document)
    for file in scratch:
        file.unlink()
    write_json(partial / "config.json", {**config, "quantization_config": contract})
    os.rename(partial, folder)


def read_contract(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a folder, checked: ours, of a schema that this version reads, complete."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not a finished microbat folder")
    contract = read_json(folder / "config.json").get("quantization_config", {})
    if contract.get("quant_method") != QUANT_METHOD:
        raise ValueError(f"{folder} is not a microbat folder (quant_method is {contract.get('quant_method')!r})")
    check_contract(contract, folder / "config.json")
    return contract


def read_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of a folder whose contract, shards and config fit each other."""
    read_contract(folder)
    checkpoint = Checkpoint(folder, index=INDEX)
    check_shards(checkpoint, [name for _, name in checkpoint.blocks])
    return checkpoint


def check_shards(checkpoint: Checkpoint, blocks: Sequence[str]) -> None:
    """Raise ValueError where the shards of a folder are not one for each of ``blocks``, what config.json asks for, and that
    of what is outside them.

    What else its index names, or lies there for an engine to find, has no digest that anybody would check. Blocks that have
    changed places would fit each other's modules.
    """
    folder = checkpoint.path
    wanted = {**{block_shard(index): name for index, name in enumerate(blocks)}, OTHER_SHARD: ""}
    there = checkpoint.files | {file for file in folder.glob("*.safetensors") if file.name != PROOF}
    for file in sorted(there ^ {folder / shard for shard in wanted}):
        raise ValueError(
            f"{file} {'is no shard of this folder' if file in there else 'is missing'}: config.json asks for {len(blocks)} "
            f"blocks, {block_shard(0)} to {block_shard(len(blocks) - 1)}, and {OTHER_SHARD}"
        )
    for shard, name in wanted.items():
        with reading(folder / shard):
            found = described(folder / shard)["name"]
        if found != name:
            raise ValueError(f"shard {folder / shard} holds {found or 'no block'}; config.json makes it {name}")


def online_bytes(folder: Path) -> int:
    """Bytes of transforms and clip ratios, what quantized layers store besides codes and scales."""
    from safetensors import safe_open

    total = 0
    for shard in folder.glob("microbat-block-*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            own = [k for k in file.keys() if ".sites." in k or ".kv." in k]  # noqa: SIM118
            total += sum(file.get_tensor(k).nbytes for k in own)
    return total


def is_microbat_folder(path: Path) -> bool:
    """Whether ``path`` is a finished folder of ours."""
    config = path / "config.json"
    return config.is_file() and read_json(config).get("quantization_config", {}).get("quant_method") == QUANT_METHOD
