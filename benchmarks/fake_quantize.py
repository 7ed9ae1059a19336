"""MXFP4 fake-quantization of 64 MiB of float32 against a plain copy of them (B8), and by other packages in the same run.

    python benchmarks/fake_quantize.py
    pip install compressed-tensors torchao; PYTHONPATH=microxcaling-clone python benchmarks/fake_quantize.py

A copy is what the memory allows: one read, one write. Both sides write into a buffer that exists; a fresh one costs a
CPU more in page faults than the arithmetic does, which a ratio of its own shows. Where microbat was installed with a C++
compiler the first ratios are its native kernel's; "by torch.compile" is what runs without. A package that is not
installed is left out; what one computes must be ours, bit for bit, under its scale rule.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
import typer
from torch import Tensor

from microbat.bench import best_times, versions
from microbat.formats.microscaling import MXFP4
from microbat.quantizers import kernel
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip

BLOCK = 32


def compressed_tensors() -> Callable[[Tensor], Tensor]:
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = preset_name_to_scheme("MXFP4", ["Linear"]).weights

    def fake(x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, BLOCK))
        return fake_quantize(x, *calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments), arguments)

    return fake


def torchao() -> Callable[[Tensor], Tensor]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return lambda x: MXTensor.to_mx(x, torch.float4_e2m1fn_x2, BLOCK).dequantize(torch.float32)


def microxcaling() -> Callable[[Tensor], Tensor]:
    from mx.mx_ops import _quantize_mx

    return lambda x: _quantize_mx(x, 8, "fp4_e2m1", axes=[-1], block_size=BLOCK, round="even")


# Name -> the module to look for, how to call it, the rule by which it takes scales.
PEERS = {
    "compressed-tensors": ("compressed_tensors", compressed_tensors, "even"),
    "torchao": ("torchao", torchao, "floor"),
    "microxcaling": ("mx", microxcaling, "floor"),
}


def installed_peers(x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Those that are installed, by name and version; ValueError where one computes something else than we do."""
    found = {}
    for name, (module, make, rule) in PEERS.items():
        if importlib.util.find_spec(module) is None:
            continue
        function = make()
        if not torch.equal(function(x), AbsMax(format=MXFP4, rule=rule).fake(x)):
            raise ValueError(f"{name} does not round to MXFP4 as microbat does with scale rule {rule!r}")
        with contextlib.suppress(PackageNotFoundError):  # a clone has none
            name += f" {version(name)}"
        found[name] = function
    return found


def main(size: int = 4096, rounds: int = 15, threads: int = 1, device: str = "cpu") -> dict[str, float]:
    """Time a ``size`` x ``size`` tensor; print and return every time as a ratio to the copy's."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(device)
    out, grad, leaf = torch.empty_like(x), torch.ones_like(x), x.clone().requires_grad_()
    quantizer = AbsMax(format=MXFP4)
    clip = Clip(quantizer, shape=(size // BLOCK,)).to(device)
    ratios = clip.ratios.detach()
    peers = installed_peers(x[:8])

    def train() -> None:
        leaf.grad = clip.logits.grad = None
        clip.fake(leaf).backward(grad)

    times = best_times(
        {
            "copy": lambda: out.copy_(x),
            "fake": lambda: quantizer.fake(x, out=out),
            "fake, clipped": lambda: quantizer.fake(x, ratios[:, 0], ratios[:, 1], out=out),
            "fake, by torch.compile": lambda: kernel.fake_quantize(
                x.view(-1, BLOCK), None, None, None, out.view(-1, BLOCK), format=MXFP4, rule=quantizer.rule
            ),
            "fake, fresh output": lambda: quantizer.fake(x),
            "fake, clip learned, forward and backward": train,
            **{name: lambda function=function: function(x) for name, function in peers.items()},
        },
        rounds=rounds,
        device=device,
    )
    print(f"{size} x {size} float32, {threads} threads, {device}, {versions()}: copy {times['copy'] * 1e3:.2f} ms")
    times_copy = {name: seconds / times["copy"] for name, seconds in times.items() if name != "copy"}
    for name, ratio in times_copy.items():
        beside = f", {ratio / times_copy['fake']:.0f} times microbat's fake" if name in peers else ""
        print(f"{name}: {ratio:.2f} times the copy{beside}")
    return times_copy


if __name__ == "__main__":
    typer.run(main)
