"""How much faster two workers train than one process: the same blocks, the same bytes, one thread each.

    OMP_NUM_THREADS=1 python benchmarks/workers.py        # needs ray, and as many idle cores as workers

Prints the seconds of the walk over the blocks, without Ray's start, and their ratio.
"""

import hashlib
import tempfile
import time
from pathlib import Path

import typer
from large_model import main as write_model

from microbat import pipeline
from microbat.calibrate import workers as ray_workers


def main(workers: int = 2, layers: int = 8, hidden: int = 512, epochs: int = 5) -> None:
    """Quantize a small random Qwen3 by batquant-paper and rtn, by one process and by ``workers``."""
    started = {"start": 0.0}
    start, calibrate = ray_workers.Workers._start, pipeline.calibrate

    def timed_start(self, *rest):
        before = time.perf_counter()
        start(self, *rest)
        started["start"] = time.perf_counter() - before

    def timed(*rest):
        before = time.perf_counter()
        yield from calibrate(*rest)
        started["walk"] = time.perf_counter() - before - started["start"]

    ray_workers.Workers._start, pipeline.calibrate = timed_start, timed
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, layers=layers, hidden=hidden, intermediate=3 * hidden, heads=hidden // 64, head_dim=64)
        seconds, digests = {}, {}
        for count in (1, workers):
            recipe = pipeline.Recipe(
                model=str(model),
                method="batquant-paper",
                solver="rtn",
                calibration=str(model / "words.txt"),
                num_calibration_samples=16,
                max_seq_length=128,
                settings={"epochs": epochs},
                precision="float32",
            )
            out = pipeline.run(recipe, Path(folder) / f"out-{count}", workers=count)
            seconds[count] = started["walk"]
            digests[count] = [hashlib.sha256(f.read_bytes()).digest() for f in sorted(out.glob("*.safetensors"))]
    same = "the same bytes" if digests[1] == digests[workers] else "OTHER BYTES"
    alone, spread = seconds[1], seconds[workers]
    print(f"one process {alone:.1f} s, {workers} workers {spread:.1f} s: {alone / spread:.2f}, {same}")


if __name__ == "__main__":
    typer.run(main)
