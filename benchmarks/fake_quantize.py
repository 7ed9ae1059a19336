"""MXFP4 fake-quantization of 64 MiB of float32 against a plain copy of them (B8).

    python benchmarks/fake_quantize.py

A copy is what the memory allows: one read, one write. Both sides write into a buffer that exists; a fresh one costs a
CPU more in page faults than the arithmetic does, which a ratio of its own shows. Where microbat was installed with a C++
compiler the first ratios are its native kernel's; "by torch.compile" is what runs without.
"""

import torch
import typer

from microbat.bench import best_times
from microbat.formats.microscaling import MXFP4
from microbat.quantizers import kernel
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip


def main(size: int = 4096, rounds: int = 15, threads: int = 1, device: str = "cpu") -> dict[str, float]:
    """Time a ``size`` x ``size`` tensor; print and return every time as a ratio to the copy's."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(device)
    out, grad, leaf = torch.empty_like(x), torch.ones_like(x), x.clone().requires_grad_()
    quantizer = AbsMax(format=MXFP4)
    clip = Clip(quantizer, shape=(size // 32,)).to(device)
    ratios = clip.ratios.detach()

    def train() -> None:
        leaf.grad = clip.logits.grad = None
        clip.fake(leaf).backward(grad)

    times = best_times(
        {
            "copy": lambda: out.copy_(x),
            "fake": lambda: quantizer.fake(x, out=out),
            "fake, clipped": lambda: quantizer.fake(x, ratios[:, 0], ratios[:, 1], out=out),
            "fake, by torch.compile": lambda: kernel.fake_quantize(
                x.view(-1, 32), None, None, None, out.view(-1, 32), format=MXFP4, rule=quantizer.rule
            ),
            "fake, fresh output": lambda: quantizer.fake(x),
            "fake, clip learned, forward and backward": train,
        },
        rounds=rounds,
        device=device,
    )
    print(f"{size} x {size} float32, {threads} threads, {device}: copy {times['copy'] * 1e3:.2f} ms")
    times_copy = {name: seconds / times["copy"] for name, seconds in times.items() if name != "copy"}
    for name, ratio in times_copy.items():
        print(f"{name}: {ratio:.2f} times the copy")
    return times_copy


if __name__ == "__main__":
    typer.run(main)
