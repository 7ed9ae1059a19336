"""A microbat folder for an engine that reads it by microbat's plugin: its files as they are, every tensor checked."""

import os
import shutil
from pathlib import Path

from microbat.export.folder import OTHER_SHARD, read_checkpoint
from microbat.export.shard import read_block, read_shard
from microbat.export.targets import AS_IT_IS, outside_reasons, target_of, tower_reasons


def export(folder: str | Path, out: str | Path, *, target: str) -> Path:
    """Copy the microbat folder ``folder`` to ``out``; return ``out``.

    Raises ValueError, before anything is written, for a target that reads another layout, and for a folder that is not
    ours or damaged.
    """
    folder, out = Path(folder), Path(out)
    engine = target_of(target, AS_IT_IS)
    checkpoint = read_checkpoint(folder)
    outside = read_block(folder / OTHER_SHARD).quantized
    if reasons := [
        *tower_reasons(engine, checkpoint.family),
        *outside_reasons(engine, outside),
    ]:
        raise ValueError(f"{folder} cannot be served by {engine.title}:\n- " + "\n- ".join(reasons))
    if out.exists():
        raise ValueError(f"output folder {out} exists; choose another or remove it")
    for shard in sorted(folder.glob("*.safetensors")):
        read_shard(shard)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    os.rename(partial, out)
    return out
