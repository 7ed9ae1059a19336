"""W4A4 products through exponent folding against cuBLAS in bfloat16, and against its FP8 (B6).

    python benchmarks/gpu_prefill.py

The activation's codes are given; folding them is timed, folding the weight in one of two rows.
"""

from collections.abc import Callable

import torch
import typer
from gpu_timing import median_times, require_gpu

from microbat.formats.microscaling import MXFP4

SHAPES = ((4096, 4096), (24576, 4096), (4096, 12288))  # out, in


def contenders(tokens: int, out: int, width: int, device: str) -> dict[str, Callable[[], object]]:
    from microbat.kernels.folding import fold, folded_matmul
    from microbat.kernels.quantize import quantize

    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(rows, width, generator=generator, device=device) for rows in (tokens, out))
    x_16, weight_16 = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    x_8, weight_8 = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    ones, weight_ones = torch.ones(tokens, 1, device=device), torch.ones(1, out, device=device)
    x_4, weight_4 = (quantize(t, format=MXFP4, rule="even") for t in (x, weight))
    settings = {"width": width, "format": MXFP4, "x_format": MXFP4}
    folded = fold(weight_4, width=width, format=MXFP4)
    return {
        "bfloat16": lambda: x_16 @ weight_16.T,
        "torch._scaled_mm, FP8": lambda: torch._scaled_mm(x_8, weight_8.T, ones, weight_ones, out_dtype=torch.bfloat16),
        "folded": lambda: folded_matmul(x_4, weight_4, folded_weight=folded, **settings),
        "folded, the weight each time": lambda: folded_matmul(x_4, weight_4, **settings),
    }


def main(tokens: int = 8192, rounds: int = 21) -> dict[str, float]:
    """Print and return, for every shape and way, how many times faster than bfloat16 it is."""
    print(require_gpu())
    speedups = {}
    for out, width in SHAPES:
        times = median_times(contenders(tokens, out, width, "cuda"), rounds=rounds)
        for name, seconds in times.items():
            speedups[f"{width} -> {out}: {name}"] = speedup = times["bfloat16"] / seconds
            teraflops = 2 * tokens * out * width / seconds / 1e12
            print(
                f"{tokens} x {width} -> {out}, {name}: {seconds * 1e6:.0f} us, {teraflops:.0f} TFLOP/s, {speedup:.2f} x bfloat16"
            )
    return speedups


if __name__ == "__main__":
    typer.run(main)
