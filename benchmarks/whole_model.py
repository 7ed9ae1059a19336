"""A whole model from its packed folder against BF16: tokens a second, and how many times smaller it is (B11).

    microbat quantize MODEL --method rtn --scheme W4A8KV16 --out FOLDER
    python benchmarks/whole_model.py FOLDER

What `microbat bench` shows as a table; memory is measured as `microbat.bench` says. Embedding and head are as they were, in BF16.
"""

from pathlib import Path

import torch
import typer

from microbat.bench import SIZES, bench


def main(folder: Path, rounds: int = 5, threads: int = 1, device: str = "cpu") -> dict[str, float]:
    """Print both sides; return the speed-up over BF16 and how many times smaller each size is."""
    result = bench(folder, device=torch.device(device), rounds=rounds, threads=threads)
    packed, bf16 = result.packed, result.bf16
    print(result.setting)
    ratios = {"tokens/s": result.ratio("speed")}
    print(f"tokens/s: packed {packed.speed:.2f}, BF16 {bf16.speed:.2f}, {ratios['tokens/s']:.2f} times as many")
    for name, what in SIZES.items():
        ratios[name] = 1 / result.ratio(what)
        ours, theirs = (getattr(side, what) / 1e6 for side in (packed, bf16))
        print(f"{name}: packed {ours:.1f} MB, BF16 {theirs:.1f} MB, {ratios[name]:.2f} times smaller")
    return ratios


if __name__ == "__main__":
    typer.run(main)
