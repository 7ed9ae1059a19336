"""The fused transform, clip, quantize and pack of an activation against a plain copy of it, in bytes per second (B2).

    python benchmarks/gpu_transform_quantize.py

The kernel reads 2 bytes an element and writes 0.53; a copy reads and writes 2 each. Beside it the same in two steps.
"""

from collections.abc import Callable

import torch
import typer
from gpu_timing import median_times, require_gpu

from microbat.formats.microscaling import MXFP4
from microbat.transforms.base import apply_blocks
from microbat.transforms.kronecker import GPK

WIDTHS = (4096, 12288)


def contenders(tokens: int, width: int, device: str) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What is timed, and the bytes that each must at least move."""
    from microbat.kernels.quantize import quantize

    generator = torch.Generator().manual_seed(0)
    transform = GPK(width=width, block=32, g1=8, init="orthogonal", generator=generator)
    blocks = transform.blocks().detach().to(device)
    x = torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16)
    low, high = torch.full((2, width // 32), 0.9, device=device)
    out = torch.empty_like(x)
    settings = {"format": MXFP4, "rule": "even", "low": low, "high": high}
    small_blocks = blocks.to(torch.bfloat16)
    functions = {
        "copy": lambda: out.copy_(x),
        "clip, quantize, pack": lambda: quantize(x, **settings),
        "transform in float32": lambda: quantize(x, blocks=blocks, **settings),
        "transform in 3 x bfloat16": lambda: quantize(x, blocks=blocks, precision="bf16x3", **settings),
        "in two steps": lambda: quantize(apply_blocks(x, small_blocks), **settings),
    }
    moved = x.numel() * (2 + MXFP4.bits_per_element(tuple(x.shape)) / 8)
    return functions, {name: 4 * x.numel() if name == "copy" else moved for name in functions}


def main(tokens: int = 8192, rounds: int = 21) -> dict[str, float]:
    """Print and return, for every width and way, its bandwidth as a share of the copy's."""
    print(require_gpu())
    shares = {}
    for width in WIDTHS:
        functions, moved = contenders(tokens, width, "cuda")
        times = median_times(functions, rounds=rounds)
        bandwidths = {name: moved[name] / times[name] for name in functions}
        for name, bandwidth in bandwidths.items():
            shares[f"{width}: {name}"] = share = bandwidth / bandwidths["copy"]
            print(
                f"{tokens} x {width}, {name}: {times[name] * 1e6:.1f} us, {bandwidth / 1e12:.2f} TB/s, {share:.2f} of the copy"
            )
    return shares


if __name__ == "__main__":
    typer.run(main)
