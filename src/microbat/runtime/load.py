"""From a folder to a model: a transformers model whose linear layers are :class:`microbat.runtime.packed.PackedLinear`."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from microbat.export.folder import INDEX, OTHER_SHARD, block_shard, is_quantizers, read_block, read_contract
from microbat.linear import install
from microbat.models.base import Checkpoint
from microbat.runtime.packed import Head, PackedLinear


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> nn.Module:
    """The model in a microbat folder, ready for ``model(...)`` and ``model.generate(...)``.

    Linear layers keep their codes and scales as stored and multiply by them in ``backend`` (``auto``: the best that each
    layer's format and device have; :mod:`microbat.runtime.packed` lists them); ``dtype`` is that of everything else and
    of their larger products. Activations are transformed and quantized as they were in calibration. A block at a time is
    unpacked to codes of a byte each while it is read and checked, nothing to floats.
    Raises ValueError for a folder that is not ours, not finished, or damaged, and for an unknown or unfit backend.
    """
    folder = Path(folder)
    read_contract(folder)
    checkpoint = Checkpoint(folder, index=INDEX)
    family = checkpoint.family
    model = checkpoint.skeleton()
    blocks = model.get_submodule(family.blocks)
    for index, block in enumerate(blocks):
        stored = read_block(folder / block_shard(index))
        install(block, stored.quantized, partial(PackedLinear, dtype=dtype, backend=backend))
        floats = {key: tensor.to(dtype) for key, tensor in stored.floats.items()}
        missing = block.load_state_dict(floats, strict=False, assign=True).missing_keys
        missing = [key for key in missing if not is_quantizers(key)]
        if missing:
            raise ValueError(f"shard {folder / block_shard(index)} lacks {missing[0]}")
    if not (folder / OTHER_SHARD).is_file():
        raise ValueError(f"{folder} lacks {OTHER_SHARD}")
    checkpoint.load_into(model.get_submodule(family.embedding), family.embedding, dtype)
    checkpoint.load_head(model, dtype)
    model.set_submodule(family.head, Head(model.get_submodule(family.head)))
    model.generation_config = checkpoint.generation_config
    return model.to(device).requires_grad_(False)
