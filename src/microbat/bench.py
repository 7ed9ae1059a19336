"""How fast a packed folder decodes on this machine and how much memory its linear layers take, beside the model in BF16.

Both sides are models of transformers in one process, decode the same number of tokens greedily, take turns, and keep their
best time. The BF16 side has the folder's weights in ordinary linear layers and transforms or quantizes nothing: what the
model costs without quantization, whether or not the one it was made from is at hand.
"""

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from microbat.runtime.cache import new_cache
from microbat.runtime.composite import CompositeLinear
from microbat.runtime.load import load, load_plain
from microbat.runtime.packed import PackedLinear

PACKAGES = ("microbat", "torch", "transformers", "triton")


@dataclass(frozen=True, kw_only=True)
class Side:
    """Tokens a second, and bytes of the linear layers that are quantized: weights, and transforms and clips."""

    speed: float
    weights: int
    online: int = 0

    @property
    def nbytes(self) -> int:
        return self.weights + self.online


@dataclass(frozen=True, kw_only=True)
class Bench:
    """``packed`` and ``bf16`` side by side; ``setting`` says how and with which versions they were measured."""

    packed: Side
    bf16: Side
    setting: str

    @property
    def speed(self) -> float:
        """How many times the tokens a second of BF16."""
        return self.packed.speed / self.bf16.speed

    @property
    def memory(self) -> float:
        """The share of BF16's bytes."""
        return self.packed.nbytes / self.bf16.nbytes


def bench(
    folder: str | Path, *, device: torch.device, tokens: int = 32, prompt: int = 16, rounds: int = 5, threads: int = 0
) -> Bench:
    """Time ``tokens`` new tokens after a ``prompt`` of so many, best of ``rounds``, on ``threads`` of a CPU (0: torch's own).

    Raises ValueError for a folder that is not ours, and for more tokens than the model's context holds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _bench(folder, device, tokens, prompt, rounds)
    finally:
        torch.set_num_threads(before)


def _bench(folder: str | Path, device: torch.device, tokens: int, prompt: int, rounds: int) -> Bench:
    packed = load(folder, dtype=torch.bfloat16, device=device)
    context = packed.config.get_text_config().max_position_embeddings
    if prompt + tokens > context:
        raise ValueError(f"prompt={prompt} and tokens={tokens} do not fit the model's context of {context}")
    bf16 = load_plain(folder, dtype=torch.bfloat16, device=device)
    sides = {"packed": lambda: _decode(packed, tokens, prompt), "bf16": lambda: _decode(bf16, tokens, prompt)}
    times = best_times(sides, rounds=rounds, device=device.type)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    quantized = {name: m for name, m in packed.named_modules() if isinstance(m, PackedLinear | CompositeLinear)}
    sites = {id(layer.site): layer.site for layer in quantized.values()}.values()
    backends = ", ".join(sorted({layer.backend for layer in layers}))
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name)
    )
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return Bench(
        packed=Side(
            speed=tokens / times["packed"],
            weights=sum(layer.nbytes for layer in layers),
            online=sum(tensor.nbytes for site in sites for tensor in site.state_dict().values()),
        ),
        bf16=Side(
            speed=tokens / times["bf16"],
            weights=sum(2 * bf16.get_submodule(name).weight.numel() for name in quantized if ".groups." not in name),
        ),
        setting=f"{tokens} tokens after {prompt}, best of {rounds}; {place}, backend {backends}; {versions}",
    )


@torch.inference_mode()
def _decode(model: nn.Module, tokens: int, prompt: int) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt), generator=generator).to(next(model.parameters()).device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
        past_key_values=new_cache(model),
    )


def best_times(functions: dict[str, Callable[[], object]], *, rounds: int, device: str = "cpu") -> dict[str, float]:
    """Seconds of each function at its best of ``rounds`` interleaved calls, after one call to warm up."""
    for function in functions.values():
        function()
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
