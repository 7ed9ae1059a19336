"""One training step of BATQuant on one Llama-shaped block, against the float step and an eager reference (B4, small).

    python benchmarks/calibration_step.py

A step is forward, backward and AdamW over transforms, clips and learned weights, as ``microbat quantize`` runs it. The
float step is the same block's own forward and backward, in the same precision, with gradients of its weights and its
input, so that both multiply the same matrices. The reference computes the same mathematics with ordinary operations:
the paper's Algorithm 1 as an einsum, the quantizer one elementwise operation at a time under autograd.
"""

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
import typer
from torch import Tensor, nn

from microbat.bench import best_times, versions
from microbat.calibrate.fake import faked
from microbat.formats.block import join_blocks, split_blocks
from microbat.formats.microscaling import MXFP4
from microbat.methods.base import Plan, SitePlan
from microbat.methods.batquant import BATQuant
from microbat.methods.learn import block_loss
from microbat.methods.learned import Learned
from microbat.models.llama import LLAMA
from microbat.quantizers import kernel
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.transforms.kronecker import GPK

SEQUENCES = 4


def main(size: int = 2048, rounds: int = 5, threads: int = 1, device: str = "cpu") -> dict[str, float]:
    """Time one step on ``size`` tokens of a block of SmolLM2-135M's shape; print and return the ratios."""
    torch.set_num_threads(threads)
    block, arguments = llama_block(size // SEQUENCES, device)
    x = torch.randn(SEQUENCES, size // SEQUENCES, 576, generator=torch.Generator().manual_seed(0)).to(device)
    steps = {"microbat": quantized_step(block, arguments, x), "float": float_step(block, arguments, x)}
    steps["eager"] = quantized_step(block, arguments, x, eager=True)
    times = best_times(steps, rounds=rounds, device=device)
    ratios = {"step / float": times["microbat"] / times["float"], "eager / step": times["eager"] / times["microbat"]}
    print(f"{size} tokens, {threads} threads, {device}, {versions()}: float step {times['float'] * 1e3:.0f} ms")
    print(f"microbat: {ratios['step / float']:.2f} times the float step")
    print(f"eager reference: {ratios['eager / step']:.1f} times microbat's step")
    return ratios


def llama_block(length: int, device: str) -> tuple[nn.Module, dict]:
    """A random decoder block of SmolLM2-135M's shape, and what the model would pass to it."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        attn_implementation="sdpa",
    )
    positions = torch.arange(length, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = LlamaDecoderLayer(config, 0).to(device)
    return block, {"position_embeddings": rotary(torch.zeros(1, device=device), positions), "position_ids": positions}


def autocast(device: str) -> contextlib.AbstractContextManager:
    """bfloat16 where the hardware multiplies it, as calibration does."""
    fast = torch.cuda.is_bf16_supported() if device.startswith("cuda") else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=fast)


def run(block: nn.Module, x: Tensor, arguments: dict, device: str) -> Tensor:
    with autocast(device):
        output = block(x, **arguments)
    return (output[0] if isinstance(output, tuple) else output).to(torch.float32)


def float_step(block: nn.Module, arguments: dict, x: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()
    target = torch.zeros_like(x)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        output = run(block, x, arguments, str(x.device))
        block_loss(output, target, x.detach(), x.detach(), "mse").backward()

    return step


def quantized_step(block: nn.Module, arguments: dict, x: Tensor, *, eager: bool = False) -> Callable[[], None]:
    plan = make_plan(block, x.device)
    weights = {path: nn.Parameter(w) for path, w in plan.latents.items()}
    modules = [module for site in plan.sites for module in (site.transform, site.activation, *site.weights.values())]
    parameters = [*weights.values(), *(p for module in modules for p in module.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    if eager:
        for site in plan.sites:
            site.transform = EagerGPK(site.transform)
            site.activation = EagerClip(site.activation)
            site.weights = {path: EagerClip(clip) for path, clip in site.weights.items()}
    target = torch.zeros_like(x)

    def step() -> None:
        with faked(block, plan, weights):
            output = run(block, x, arguments, str(x.device))
        loss = block_loss(output, target, x, x, "relative")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def make_plan(block: nn.Module, device: torch.device) -> Plan:
    """What BATQuant with learned rounding sets up for one block in MXFP4, before its first step."""
    quantizer = AbsMax(format=MXFP4)
    sites = [
        SitePlan(site=site, transform=None, activation=quantizer, weights=dict.fromkeys(site.consumers, quantizer))
        for site in LLAMA.sites
    ]
    data = SimpleNamespace(
        block=block, generator=torch.Generator().manual_seed(0), faked=lambda plan, weights, rounding: None
    )
    plan = BATQuant(epochs=0).prepare(data, Plan(sites=sites), Learned())
    for site in plan.sites:
        for module in (site.transform, site.activation, *site.weights.values()):
            module.to(device)
    return plan


class EagerGPK(nn.Module):
    """Algorithm 1 of the paper, one einsum over both factors."""

    def __init__(self, gpk: GPK):
        super().__init__()
        self.gpk = gpk

    def forward(self, x: Tensor) -> Tensor:
        return self._apply(x, self.gpk.A, self.gpk.B)

    def inverse_t(self, w: Tensor) -> Tensor:
        A, B = (torch.linalg.inv(m.to(torch.float64)).to(m.dtype).mT for m in (self.gpk.A, self.gpk.B))
        return self._apply(w, A, B)

    def _apply(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        split = x.unflatten(-1, (B.shape[0], B.shape[1], A.shape[0]))
        return torch.einsum("kij,...kjl,lm->...kim", B, split, A).reshape(x.shape)


class EagerClip(nn.Module):
    """Clip, scale, round, by the kernel's plain functions under autograd; a straight-through estimator each by detach."""

    def __init__(self, clip: Clip):
        super().__init__()
        self.clip = clip

    def fake(self, x: Tensor) -> Tensor:
        format, rule = self.clip.inner.format, self.clip.inner.rule
        blocks = split_blocks(x, format.block_of(x.shape[-1]))
        low = self.clip.ratios[..., 0] * blocks.amin(-1).clamp(max=0)
        high = self.clip.ratios[..., 1] * blocks.amax(-1).clamp(min=0)
        clipped = torch.minimum(torch.maximum(blocks, low[..., None]), high[..., None])
        amax = torch.maximum(high, -low)
        scale = kernel.block_scale(clipped.detach(), amax.detach(), None, format, rule)
        rounded = kernel.round_blocks(clipped.detach(), scale, format)
        scale = (scale * amax / amax.detach())[..., None]
        scaled = clipped / scale
        passed = torch.where(scaled.abs() <= format.element.max, scaled, scaled.detach())
        return join_blocks((passed + (rounded - passed).detach()) * scale, x.shape[-1])


if __name__ == "__main__":
    typer.run(main)
