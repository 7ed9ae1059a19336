"""Timing on a GPU: alternatives take turns as CUDA graphs, each from a cold cache; a refusal where there is no GPU."""

from collections.abc import Callable
from statistics import median

import torch

from microbat.bench import versions

CACHE = 256 << 20  # bytes written before every measurement, several times what an L2 cache holds


def require_gpu() -> str:
    """The GPU's name and the versions; leaves the program with a sentence where torch sees none."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark measures a GPU, and torch sees none here (torch.cuda.is_available() is False)")
    return f"{torch.cuda.get_device_name()}, {versions()}"


def median_times(functions: dict[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Seconds of each function, the median of ``rounds`` interleaved replays of its graph; launches are not counted."""
    cache = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    graphs = {name: _captured(function) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return {name: median(seconds) for name, seconds in times.items()}


def _captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles, and lets libraries choose their kernels
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph
