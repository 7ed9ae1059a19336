"""What methods do to the whole model at once: a rotation before the blocks' turn, distillation after it.

Each leaves a file in the job's scratch folder when it is done, where an interrupted run finds it.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from microbat.calibrate.job import Job
from microbat.documents import read_json, write_json
from microbat.export import folder as folders
from microbat.export.shard import float_tensors, read_block, write_block
from microbat.linear import QuantBlock
from microbat.methods.base import ModelData, Preparer, Student
from microbat.models.checkpoint import Checkpoint
from microbat.models.rotation import RotatedCheckpoint, Rotation
from microbat.runtime.load import assemble

ROTATION_FILE, DISTILLED_FILE = "rotation.safetensors", "distilled.json"
# A bar with a title for a number of steps; each is told its index, how much of it is done, and the loss.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int, float, float], None]]]


def rotated(job: Job, bar: Bar) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint rotated as the method wants it, as the interrupted run had it or decided now and kept; and what the report
    says of it, nothing where no method rotates."""
    file = job.scratch / ROTATION_FILE
    turning = [preparer for preparer in job.preparers if type(preparer).rotation is not Preparer.rotation]
    if not turning:
        return job.checkpoint, {}
    if not file.is_file():
        started = time.perf_counter()
        with bar(f"{turning[0].name} rotation", 1) as progress:
            data = _data(job, progress)
            rotations = [r for r in (preparer.rotation(data) for preparer in turning) if r is not None]
        if not rotations:
            return job.checkpoint, {}
        tensors = {"stream": rotations[0].stream, "heads": rotations[0].heads}
        spent = {"seconds": str(time.perf_counter() - started)}
        save_file({k: t for k, t in tensors.items() if t is not None}, file.with_suffix(".tmp"), metadata=spent)
        os.replace(file.with_suffix(".tmp"), file)
    with safe_open(file, "pt") as kept:
        seconds = float(kept.metadata()["seconds"])
    return RotatedCheckpoint(job.checkpoint, Rotation(**load_file(file))), {"seconds": seconds}


def distilled(job: Job, outside: QuantBlock, bar: Bar) -> dict[str, Any]:
    """Train the whole quantized model as the method wants it: its shards are written anew beside the old ones, and take their
    place when all are there. ``outside`` are the codes outside the blocks. What the report says of it; nothing where no method
    does."""
    distilling = [preparer for preparer in job.preparers if preparer.distills]
    if not distilling:
        return {}
    marker = job.scratch / DISTILLED_FILE
    shards = [job.scratch / folders.block_shard(index) for index in range(len(job.checkpoint.blocks))]
    renewed = [shard.with_name(f"distilled-{shard.name}") for shard in shards]
    if not marker.is_file():
        with bar(f"{distilling[0].name} distillation", 1) as progress:
            record = _distill(job, outside, distilling, shards, renewed, progress)
        write_json(marker, record)
    for new, shard in zip(renewed, shards, strict=True):
        if new.is_file():
            os.replace(new, shard)
    _prove(job, outside, shards)
    return read_json(marker)


def _distill(
    job: Job,
    outside: QuantBlock,
    preparers: list[Preparer],
    shards: list[Path],
    renewed: list[Path],
    progress: Callable[[int, float, float], None],
) -> dict[str, Any]:
    """Write the model of ``shards`` into ``renewed`` as distillation leaves it; its losses and its time."""
    started = time.perf_counter()
    data = _data(job, progress)
    stored = [read_block(shard) for shard in shards]
    stored = [dataclasses.replace(block, quantized=block.quantized.thawed()) for block in stored]
    network = assemble(job.checkpoint, stored, outside=outside, device=job.device)
    blocks = [block.quantized for block in stored]
    student = Student(
        network=network,
        transforms=[transform for block in blocks for transform in block.transforms],
        quantizers=[quantizer for block in blocks for quantizer in block.quantizers],
    )
    loss = [step for preparer in preparers for step in preparer.distill(data, student)]
    for (_, name), file, block in zip(job.checkpoint.blocks, renewed, blocks, strict=True):
        write_block(file, name, block, float_tensors(network.get_submodule(name)))
    return {"loss": loss, "seconds": time.perf_counter() - started}


@torch.no_grad()
def _prove(job: Job, outside: QuantBlock, shards: list[Path]) -> None:
    """Renew the proof of a model whose shards have changed: what its last block makes of the first sequence."""
    blocks = (read_block(shard) for shard in shards)
    model = assemble(job.checkpoint, blocks, outside=outside, device=job.device)
    outputs: list[Tensor] = []
    model.get_submodule(job.checkpoint.family.blocks)[-1].register_forward_hook(
        lambda _, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.autocast(job.device.type, torch.bfloat16, enabled=job.precision == "bfloat16"):
        model(**{name: tensor.to(job.device) for name, tensor in job.first.items()}, use_cache=False)
    folders.write_proof(job.scratch / folders.PROOF, job.first, outputs[0].to(torch.float32))


def _data(job: Job, progress: Callable[[int, float, float], None]) -> ModelData:
    return ModelData(
        checkpoint=job.checkpoint,
        tokens=job.tokens,
        pairs=job.pairs,
        scheme=job.scheme,
        seed=job.seed,
        device=job.device,
        precision=job.precision,
        progress=lambda share, loss: progress(0, share, loss),
    )
