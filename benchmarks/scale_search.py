"""The best of all values that NVFP4's block scales can have, of a 4096 x 4096 weight: SOAR's sweep, which looks at 25 around the
largest magnitude, against a search that looks at all 126, on its first rows.

    python benchmarks/scale_search.py

Both must end at the same error: what the window leaves out is never better (methods/soar.py says why).
"""

import time
from collections.abc import Callable

import torch
import typer
from torch import Tensor

from microbat.bench import versions
from microbat.formats.block import split_blocks
from microbat.formats.microscaling import NVFP4
from microbat.methods.soar import SOAR
from microbat.quantizers.base import AbsMax, Scales

QUANTIZER = AbsMax(format=NVFP4)
SWEEP = SOAR(search="sweep", closed_form=False, rounds=1)


def swept(weight: Tensor) -> Tensor:
    """Squared error of each row [N]."""
    return (SWEEP.solve(weight, QUANTIZER, None).weight.dequantize() - weight).square().sum(-1)


def exhaustive(weight: Tensor) -> Tensor:
    """The same, by every positive value of E4M3."""
    scales = QUANTIZER.scales(weight)
    least = torch.full_like(scales.block, float("inf"))
    for value in NVFP4.scale_element.grid[1:].tolist():
        tried = Scales(block=torch.full_like(scales.block, value), tensor=scales.tensor)
        got = split_blocks(QUANTIZER.round(weight, tried), 16) * tried.product[..., None]
        least = torch.minimum(least, (got - split_blocks(weight, 16)).square().sum(-1))
    return least.sum(-1)


def timed(search: Callable[[Tensor], Tensor], weight: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    error = search(weight).double().sum().item()
    return time.perf_counter() - start, error


def main(size: int = 4096, rows: int = 256, threads: int = 2) -> dict[str, float]:
    """Seconds for the whole weight, and how many times as long the search of all values takes on ``rows`` of it."""
    torch.set_num_threads(threads)
    weight = 0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    timed(swept, weight[:8])
    seconds, _ = timed(swept, weight)
    (ours, found), (plain, least) = timed(swept, weight[:rows]), timed(exhaustive, weight[:rows])
    if abs(found - least) > 1e-5 * least:
        raise ValueError(f"the sweep ends at a squared error of {found}, all values at {least}")
    print(f"{size} x {size}, {threads} threads, {versions()}: swept in {seconds:.1f} s")
    print(f"{rows} rows: all 126 values take {plain / ours:.1f} times as long, and find the same")
    return {"seconds": seconds, "ratio": plain / ours}


if __name__ == "__main__":
    typer.run(main)
