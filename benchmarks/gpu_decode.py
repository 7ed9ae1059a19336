"""Decoding one token with 4-bit weights against cuBLAS in bfloat16: all linear layers of a block of an 8B model (B5).

    python benchmarks/gpu_decode.py

Both sides multiply the same merged matrices (queries, keys and values; gate and up), more bytes than a cache holds.
The bits allow 16 / 4.25 = 3.76 times.
"""

from collections.abc import Callable

import torch
import typer
from gpu_timing import median_times, require_gpu

from microbat.formats.microscaling import MXFP4

LAYERS = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))  # Qwen3-8B: out, in


def contenders(tokens: int, layers: tuple[tuple[int, int], ...], device: str) -> dict[str, Callable[[], object]]:
    from microbat.kernels.matvec import matvec
    from microbat.kernels.quantize import quantize

    generator = torch.Generator(device).manual_seed(0)
    inputs, floats, packed = [], [], []
    for out, width in layers:
        weight = torch.randn(out, width, generator=generator, device=device)
        inputs.append(torch.randn(tokens, width, generator=generator, device=device).to(torch.bfloat16))
        floats.append(weight.to(torch.bfloat16))
        packed.append(quantize(weight, format=MXFP4, rule="even"))
    return {
        "bfloat16": lambda: [torch.nn.functional.linear(x, w) for x, w in zip(inputs, floats, strict=True)],
        "mxfp4": lambda: [matvec(x, *w, format=MXFP4) for x, w in zip(inputs, packed, strict=True)],
    }


def main(tokens: int = 1, rounds: int = 51) -> dict[str, float]:
    """Print and return how many times faster the packed weights are."""
    print(require_gpu())
    times = median_times(contenders(tokens, LAYERS, "cuda"), rounds=rounds)
    weights = sum(out * width for out, width in LAYERS)
    for name, bits in (("bfloat16", 16.0), ("mxfp4", 4.25)):
        print(
            f"{tokens} tokens, {name}: {times[name] * 1e6:.1f} us, {weights * bits / 8 / times[name] / 1e12:.2f} TB/s"
        )
    speedup = times["bfloat16"] / times["mxfp4"]
    print(f"mxfp4 is {speedup:.2f} times as fast as bfloat16 (its bits allow 3.76)")
    return {"speedup": speedup}


if __name__ == "__main__":
    typer.run(main)
