"""What the online transform costs a low-bit linear layer at prefill (B3): W4A4, with and without transform and clip.

python benchmarks/gpu_layer.py
"""

from collections.abc import Callable

import torch
import typer
from gpu_timing import median_times, require_gpu

from microbat.formats.microscaling import MXFP4
from microbat.transforms.kronecker import GPK


def contenders(tokens: int, width: int, out: int, device: str) -> dict[str, Callable[[], object]]:
    from microbat.kernels.folding import fold, folded_matmul
    from microbat.kernels.quantize import quantize

    generator = torch.Generator().manual_seed(0)
    transform = GPK(width=width, block=32, g1=8, init="orthogonal", generator=generator)
    blocks = transform.blocks().detach().to(device)
    low, high = torch.full((2, width // 32), 0.9, device=device)
    x = torch.randn(tokens, width, generator=generator).to(device, torch.bfloat16)
    weight = quantize(torch.randn(out, width, generator=generator).to(device), format=MXFP4, rule="even")
    folded = fold(weight, width=width, format=MXFP4)

    def layer(**settings: object) -> torch.Tensor:
        codes = quantize(x, format=MXFP4, rule="even", **settings)
        return folded_matmul(codes, weight, width=width, format=MXFP4, x_format=MXFP4, folded_weight=folded)

    return {
        "plain": layer,
        "transform and clip, float32": lambda: layer(blocks=blocks, low=low, high=high),
        "transform and clip, 3 x bfloat16": lambda: layer(blocks=blocks, low=low, high=high, precision="bf16x3"),
    }


def main(tokens: int = 2048, width: int = 4096, out: int = 24576, rounds: int = 21) -> dict[str, float]:
    """Print and return the times as ratios to the layer without a transform."""
    print(require_gpu())
    times = median_times(contenders(tokens, width, out, "cuda"), rounds=rounds)
    ratios = {name: seconds / times["plain"] for name, seconds in times.items()}
    for name, ratio in ratios.items():
        print(f"{tokens} x {width} -> {out}, {name}: {times[name] * 1e6:.1f} us, {ratio:.3f} times the plain layer")
    return ratios


if __name__ == "__main__":
    typer.run(main)
