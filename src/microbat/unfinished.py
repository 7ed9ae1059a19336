"""An unfinished run: its folder ``<out>.partial``, whose run it is, and the blocks that are done in it."""

import shutil
from pathlib import Path

from torch import Tensor, nn

from microbat import account
from microbat.calibrate.job import Record
from microbat.calibrate.stream import Sample
from microbat.documents import read_json, write_json
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.linear import QuantBlock
from microbat.models.checkpoint import Checkpoint
from microbat.recipe import Recipe, to_json

RUN_FILE = "run.json"


def open_partial(partial: Path, recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Make the folder for work in progress, or find that of the same recipe interrupted earlier."""
    run = {"recipe": to_json(recipe), "versions": account.versions()}
    if partial.exists():
        file = partial / RUN_FILE
        if not file.is_file() or read_json(file) != run:
            raise ValueError(
                f"{partial} holds an unfinished run of another recipe or version; remove it or choose another output"
            )
        return
    partial.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(partial.parent).free, checkpoint.nbytes
    if free < needed:
        raise ValueError(
            f"{partial.parent} has {free / 1e9:.1f} GB free; the checkpoint may take up to {needed / 1e9:.1f} GB"
        )
    partial.mkdir()
    write_json(partial / RUN_FILE, run)


class FolderKeeper:
    """Finished blocks in the partial folder: a record, then the shard, whose presence says that the block is done."""

    def __init__(self, partial: Path):
        self.partial = partial

    def has(self, index: int) -> bool:
        return (self.partial / folders.block_shard(index)).is_file()

    def load(self, index: int) -> tuple[QuantBlock, dict[str, Tensor], Record]:
        record = Record(**read_json(self._record(index)))
        stored = shards.read_block(self.partial / folders.block_shard(index))
        return stored.quantized, stored.floats, record

    def save(self, index: int, block: QuantBlock, module: nn.Module, record: Record) -> None:
        write_json(self._record(index), vars(record))
        path = self.partial / folders.block_shard(index)
        shards.write_block(path, record.name, block, shards.float_tensors(module))

    def finish(self, sample: Sample, outputs: Tensor) -> None:
        folders.write_proof(self.partial / folders.PROOF, sample, outputs)

    def record_files(self) -> list[Path]:
        return sorted(self.partial.glob("record-*.json"))

    def _record(self, index: int) -> Path:
        return self.partial / f"record-{index:03d}.json"
