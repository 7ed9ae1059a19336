"""Timing for the benchmarks: alternatives take turns in one process, and each keeps its best time."""

import time
from collections.abc import Callable

import torch


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
