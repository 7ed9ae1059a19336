"""From a folder to a model: a transformers model whose linear layers are :class:`microbat.linear.QuantLinear`."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from microbat.export.folder import (
    INDEX,
    OTHER_SHARD,
    StoredBlock,
    block_shard,
    check_fit,
    is_quantizers,
    read_block,
    read_contract,
    read_shard,
)
from microbat.linear import install
from microbat.models.base import Checkpoint


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
    """The model in a microbat folder, ready for ``model(...)`` and ``model.generate(...)``.

    Weights stay on their format's grid (unpacked to ``dtype``), activations are transformed and quantized as they were
    in calibration. Raises ValueError for a folder that is not ours, not finished, or damaged.
    """
    folder = Path(folder)
    read_contract(folder)
    checkpoint = Checkpoint(folder, index=INDEX)
    if not (folder / OTHER_SHARD).is_file():
        raise ValueError(f"{folder} lacks {OTHER_SHARD}")
    read_shard(folder / OTHER_SHARD)  # an altered tensor shows here, with its name
    blocks = (read_block(folder / block_shard(index)) for index in range(checkpoint.config.num_hidden_layers))
    return assemble(checkpoint, blocks, dtype=dtype, device=device)


def assemble(
    checkpoint: Checkpoint,
    blocks: Iterable[StoredBlock],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model of ``blocks`` and of what ``checkpoint`` has beside them; ValueError where they do not fit its config."""
    family = checkpoint.family
    model = checkpoint.skeleton()
    for index, (block, stored) in enumerate(zip(model.get_submodule(family.blocks), blocks, strict=True)):
        name = f"{family.blocks}.{index}"
        own = next((key for key in checkpoint.names if key.startswith(f"{name}.")), None)
        if own is None:
            raise ValueError(f"{checkpoint.path} has no tensor of {name}, which config.json asks for")
        file = checkpoint.file_of(own)
        check_fit(block, stored, file)
        install(block, stored.quantized, dtype)
        floats = {key: tensor.to(dtype) for key, tensor in stored.floats.items()}
        missing = block.load_state_dict(floats, strict=False, assign=True).missing_keys
        missing = [key for key in missing if not is_quantizers(key)]
        if missing:
            raise ValueError(f"{file} lacks {name}.{missing[0]}")
    checkpoint.load_into(model.get_submodule(family.embedding), family.embedding, dtype)
    checkpoint.load_head(model, dtype)
    model.generation_config = checkpoint.generation_config
    return model.to(device).requires_grad_(False)
