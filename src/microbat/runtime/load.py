"""From a folder to a model: a transformers model whose linear layers run from their bits (:mod:`microbat.runtime.packed`)."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from microbat.experts import ExpertLinear
from microbat.export.folder import OTHER_SHARD, block_shard, read_checkpoint
from microbat.export.shard import StoredBlock, check_fit, is_quantizers, read_block
from microbat.kv import KVQuantizer
from microbat.linear import Linear, QuantBlock, QuantLinear, dequantized, install
from microbat.models.checkpoint import Checkpoint
from microbat.quantizers.residual import Residual
from microbat.runtime.composite import packed_linear
from microbat.runtime.packed import Head


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
    checkpoint, blocks, outside = _read(Path(folder))
    linear = partial(packed_linear, dtype=dtype, device=device, backend=backend)
    model = assemble(checkpoint, blocks, linear, outside=outside, dtype=dtype, device=device)
    head = checkpoint.family.head
    if head not in outside.weights:
        model.set_submodule(head, Head(model.get_submodule(head)))
    return model


def load_dequantized(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model with its weights as floats on their grid, as calibration ran it: what to compare :func:`load` with."""
    checkpoint, blocks, outside = _read(Path(folder))
    return assemble(checkpoint, blocks, outside=outside, dtype=dtype)


def load_plain(folder: str | Path, *, dtype: torch.dtype, device: str | torch.device = "cpu") -> nn.Module:
    """What the model costs when nothing is quantized: its weights as ordinary linear layers, no transforms, no quantizers.

    To be timed. Where a folder has transforms or scales online, it is not the calibrated model: that is
    :func:`load_dequantized`.
    """
    checkpoint, blocks, outside = _read(Path(folder))
    model = assemble(checkpoint, blocks, outside=outside, dtype=dtype, device=device)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            quantizer, weight = module.site.quantizer, module.weight
            weight = quantizer.original(weight) if isinstance(quantizer, Residual) else weight
            if weight.dim() == 3:
                model.set_submodule(name, ExpertLinear.of(weight))
                continue
            linear = nn.Linear(1, 1, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), module.bias
            linear.out_features, linear.in_features = weight.shape
            model.set_submodule(name, linear)
        elif isinstance(getattr(module, "kv", None), KVQuantizer):
            module.kv = None
    return model


def _read(folder: Path) -> tuple[Checkpoint, Iterable[StoredBlock], QuantBlock]:
    """The folder's checkpoint, its blocks, and the codes outside them."""
    checkpoint = read_checkpoint(folder)
    outside = read_block(folder / OTHER_SHARD).quantized  # an altered tensor shows here, with its name
    return checkpoint, (read_block(folder / block_shard(i)) for i in range(len(checkpoint.blocks))), outside


def assemble(
    checkpoint: Checkpoint,
    blocks: Iterable[StoredBlock],
    linear: Linear | None = None,
    *,
    outside: QuantBlock | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model of ``blocks``, of the codes ``outside`` them and of what ``checkpoint`` has beside; ValueError where they do not
    fit its config.

    ``linear`` makes a quantized layer of its site, codes and bias; None: one with a float weight of ``dtype``.
    """
    linear = linear or partial(dequantized, dtype=dtype)
    model = checkpoint.skeleton()
    if outside is not None:
        check_fit(model, StoredBlock(quantized=outside, floats={}), checkpoint.path / OTHER_SHARD)
        install(model, outside, linear)
    for (_, name), stored in zip(checkpoint.blocks, blocks, strict=True):
        block = model.get_submodule(name)
        own = next((key for key in checkpoint.names if key.startswith(f"{name}.")), None)
        if own is None:
            raise ValueError(f"{checkpoint.path} has no tensor of {name}, which config.json asks for")
        file = checkpoint.file_of(own)
        check_fit(block, stored, file)
        install(block, stored.quantized, linear)
        floats = {key: tensor.to(dtype) for key, tensor in stored.floats.items()}
        missing = block.load_state_dict(floats, strict=False, assign=True).missing_keys
        missing = [key for key in missing if not is_quantizers(key)]
        if missing:
            raise ValueError(f"{file} lacks {name}.{missing[0]}")
    checkpoint.load_entry(model, dtype)
    checkpoint.load_head(model, dtype)
    model.generation_config = checkpoint.generation_config
    return model.to(device).requires_grad_(False)
