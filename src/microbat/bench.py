"""How fast a packed folder decodes on this machine and how much memory it takes, beside the model in BF16.

Each side is a model of transformers in a process of its own; they decode the same number of tokens greedily, take turns, and
keep their best time. The BF16 side has the folder's weights in ordinary linear layers and transforms or quantizes nothing: what
the model costs without quantization, whether or not the one it was made from is at hand.

Memory on a CPU is what a process has resident, pages of mapped files among it. The peak is Linux's ``VmHWM``, set back once the
model is there: loading decodes and checks, and what that takes is not what decoding takes. ``ru_maxrss`` cannot be set back
and begins with the peak of the process that started this one; it stands in elsewhere, and there ``decoding`` has loading in
it. On a GPU memory is what torch's allocator has given out.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from microbat.calibrate.memory import peak_memory
from microbat.export.folder import INDEX, read_contract
from microbat.models.checkpoint import Checkpoint
from microbat.runtime.cache import new_cache
from microbat.runtime.composite import CompositeLinear
from microbat.runtime.experts import PackedExperts
from microbat.runtime.load import load, load_plain
from microbat.runtime.packed import PackedLinear

PACKAGES = ("microbat", "torch", "transformers", "triton")
# What a side takes, and the number of it that says how much.
SIZES = {
    "linear layers, with transforms and clips": "linear",
    "checkpoint": "checkpoint",
    "peak memory while decoding": "decoding",
    "peak memory while decoding, beyond the libraries": "model",
    "peak memory while loading": "loading",
}
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # proc(5); "5" sets VmHWM back


@dataclass(frozen=True, kw_only=True)
class Side:
    """``speed`` in tokens a second; the rest in bytes. Of the linear layers that are quantized ``weights``, and ``online``:
    transforms and clips. ``checkpoint``: all tensors as stored, in BF16 as they would be. The process: ``libraries``, what
    it holds before there is a model; ``loading``, its peak until that is there; ``decoding``, its peak from then on."""

    speed: float
    weights: int
    online: int = 0
    checkpoint: int
    libraries: int
    loading: int
    decoding: int

    @property
    def linear(self) -> int:
        return self.weights + self.online

    @property
    def model(self) -> int:
        """What of the peak while decoding the libraries alone do not take: the model, its cache, what is transient."""
        return self.decoding - self.libraries


@dataclass(frozen=True, kw_only=True)
class Bench:
    """``packed`` and ``bf16`` side by side; ``setting`` says how and with which versions they were measured."""

    packed: Side
    bf16: Side
    setting: str

    def ratio(self, what: str) -> float:
        """The packed side's ``what``, a number of :class:`Side`, over BF16's."""
        return getattr(self.packed, what) / getattr(self.bf16, what)


def bench(
    folder: str | Path,
    *,
    device: torch.device,
    tokens: int = 32,
    prompt: int = 16,
    rounds: int = 5,
    threads: int = 0,
    backend: str = "auto",
) -> Bench:
    """Time ``tokens`` new tokens after a ``prompt`` of so many, best of ``rounds``, on ``threads`` of a CPU (0: torch's own).

    Raises ValueError for a folder that is not ours, for more tokens than the model's context holds, and for an unknown or
    unfit ``backend`` of the packed side. It starts processes: a script calls it below ``if __name__ == "__main__":``.
    """
    folder = Path(folder)
    read_contract(folder)
    context = Checkpoint(folder, index=INDEX).config.get_text_config().max_position_embeddings
    if prompt + tokens > context:
        raise ValueError(f"prompt={prompt} and tokens={tokens} do not fit the model's context of {context}")
    with _process() as first, _process() as second:
        packed = lambda task, *given: first.submit(task, (folder, device, backend), *given).result()  # noqa: E731
        bf16 = lambda task, *given: second.submit(task, (folder, device, None), *given).result()  # noqa: E731
        memory = [ask(_load, threads) for ask in (packed, bf16)]
        weights, online, names, backends, place = packed(_packed)
        plain, checkpoint = bf16(_plain, names)
        sides = {"packed": lambda: packed(_decode, tokens, prompt), "bf16": lambda: bf16(_decode, tokens, prompt)}
        times = best_times(sides, rounds=rounds)
        peaks = [ask(_peak_of) for ask in (packed, bf16)]
    stored = sum(file.stat().st_size for file in folder.glob("microbat-*.safetensors"))
    speed = {name: tokens / seconds for name, seconds in times.items()}
    size = {"weights": weights, "online": online, "checkpoint": stored}
    return Bench(
        packed=Side(speed=speed["packed"], **size, **memory[0], decoding=peaks[0]),
        bf16=Side(speed=speed["bf16"], weights=plain, checkpoint=checkpoint, **memory[1], decoding=peaks[1]),
        setting=f"{tokens} tokens after {prompt}, best of {rounds}; {place}, backend {backends}; {versions()}",
    )


def versions(*others: str) -> str:
    """microbat's, torch's, transformers', Triton's and those of ``others``, of what is installed."""
    names = [name for name in (*PACKAGES, *others) if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def _process() -> ProcessPoolExecutor:
    """One fresh process, which keeps its model between tasks."""
    return ProcessPoolExecutor(1, get_context("spawn"))


Which = tuple[
    Path, torch.device, str | None
]  # each task's first argument: folder, device, and the backend or None for BF16


@functools.cache
def _model(which: Which) -> nn.Module:
    folder, device, backend = which
    if backend is None:
        return load_plain(folder, dtype=torch.bfloat16, device=device)
    return load(folder, dtype=torch.bfloat16, device=device, backend=backend)


def _load(which: Which, threads: int) -> dict[str, int]:
    """What the process holds before it has a model, and its peak until it has."""
    folder, device, _ = which
    torch.set_num_threads(threads or torch.get_num_threads())
    Checkpoint(folder, index=INDEX).skeleton()  # imports the model's own code
    _peak(device)
    libraries = _peak(device)  # what stays of it
    _model(which)
    return {"libraries": libraries, "loading": _peak(device)}


def _packed(which: Which) -> tuple[int, int, list[str], str, str]:
    """Bytes of weights, and of transforms and clips; the layers' names; what ran them, and where."""
    model, device = _model(which), which[1]
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    quantized = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear | CompositeLinear | PackedExperts)
    }
    sites = {id(layer.site): layer.site for layer in quantized.values()}.values()
    online = sum(tensor.nbytes for site in sites for tensor in site.state_dict().values())
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    backends = ", ".join(sorted({layer.backend for layer in layers}))
    names = [name for name in quantized if ".groups." not in name]
    return sum(layer.nbytes for layer in layers), online, names, backends, place


def _plain(which: Which, names: list[str]) -> tuple[int, int]:
    """Bytes of the named layers' weights, and of all parameters."""
    model = _model(which)
    weights = sum(model.get_submodule(name).weight.nbytes for name in names)
    return weights, sum(parameter.nbytes for parameter in model.parameters())


def _peak_of(which: Which) -> int:
    return _peak(which[1])


def _peak(device: torch.device) -> int:
    """The most bytes in use since the last call, or since the process began; what is free goes back to the system."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if not RESET.exists():
        return peak_memory()
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc keeps it for later: not what comes next takes
        ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    return 1024 * int(fields["VmHWM"].split()[0])


@torch.inference_mode()
def _decode(which: Which, tokens: int, prompt: int) -> None:
    model = _model(which)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt), generator=generator).to(which[1])
    made = model.generate(
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
    made.cpu()  # what a GPU was asked for is done


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
