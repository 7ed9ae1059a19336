"""One token times a packed weight of 14336 x 4096 against torch's BF16 and INT8 products and llama.cpp's MXFP4 (B9).

    python benchmarks/packed_product.py
    python benchmarks/packed_product.py --tokens 256

Each side turns through several weights, so that no cache holds them. Integers times integers: microbat quantizes the tokens and
scales the sums as well, torch._int_mm gets codes and gives int32. Products with floats run again as on lesser processors.
llama.cpp runs where its wheel xllamacpp is installed.
"""

import ctypes
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial

import torch
import typer

from microbat import native
from microbat.bench import best_times, versions
from microbat.linear import SiteInput
from microbat.quantizers.base import AbsMax
from microbat.runtime.packed import PackedLinear
from microbat.scheme import formats

GGML_F32, GGML_BF16, GGML_MXFP4 = 0, 30, 39
FORMATS = ("mxfp4", "nvfp4", "mxfp8_e4m3")
INTEGERS = ("int8", "int4_row", "int4")  # of weights; tokens are int8
COPIES = 4


def main(rows: int = 14336, width: int = 4096, tokens: int = 1, rounds: int = 20, threads: int = 1) -> dict[str, float]:
    """Time ``tokens`` x ``width`` times ``rows`` x ``width``; print each time, and return it as a speed-up over BF16."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    x = AbsMax(format=formats()["mxfp8_e4m3"]).fake(torch.randn(tokens, width, generator=generator))
    half, half_x = [weight.to(torch.bfloat16) for _ in range(COPIES)], x.to(torch.bfloat16)
    sides = {"torch BF16": turning([lambda w=w: torch.nn.functional.linear(half_x, w) for w in half])}
    for name in FORMATS:
        codes = AbsMax(format=formats()[name]).quantize(weight)
        layers = [PackedLinear(SiteInput(), codes, None, dtype=torch.float32) for _ in range(COPIES)]
        sides[f"microbat {name}"] = turning([lambda layer=layer: layer(x) for layer in layers])
        for most in native.LEVELS[: native.LEVELS.index(native.product_level(codes.format))]:
            sides[f"microbat {name}, {most}"] = turning([partial(lesser, layer, x, most) for layer in layers])
    per_token = AbsMax(format=formats()["int8"])
    for name in INTEGERS:
        codes = AbsMax(format=formats()[name]).quantize(weight)
        layers = [PackedLinear(SiteInput(None, per_token), codes, None, dtype=torch.float32) for _ in range(COPIES)]
        sides[f"microbat {name} x int8"] = turning([lambda layer=layer: layer(x) for layer in layers])
    integers = [per_token.quantize(weight).codes.view(torch.int8) for _ in range(COPIES)]
    int_x = per_token.quantize(x).codes.view(torch.int8)
    sides["torch._int_mm"] = turning([lambda w=w: torch._int_mm(int_x, w.T) for w in integers])
    if importlib.util.find_spec("xllamacpp"):
        sides["llama.cpp BF16"] = turning([llama_cpp(weight, x, GGML_BF16, threads) for _ in range(COPIES)])
        sides["llama.cpp MXFP4"] = turning([llama_cpp(weight, x, GGML_MXFP4, threads) for _ in range(COPIES)])
    times = best_times(sides, rounds=rounds)
    print(
        f"{tokens} x {width} times {rows} x {width}, {threads} threads, backend {layers[0].backend}; {versions('xllamacpp')}"
    )
    others = [name for name in ("torch BF16", "llama.cpp MXFP4") if name in times]
    for name, seconds in times.items():
        ratios = (f"{times[other] / seconds:.2f} times as fast as {other}" for other in others)
        print(f"{name}: {seconds * 1e3:.2f} ms, {', '.join(ratios)}")
    return {name: times["torch BF16"] / seconds for name, seconds in times.items()}


def lesser(layer: PackedLinear, x: torch.Tensor, most: str) -> torch.Tensor:
    """The layer's product as on a processor that has no more than these instructions."""
    return native.product(x, layer.codes, layer.scales, layer.outer, format=layer.format, most=most)


def turning(functions: list[Callable[[], object]]) -> Callable[[], object]:
    """One function that calls the given ones in turn."""
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def llama_cpp(weight: torch.Tensor, x: torch.Tensor, kind: int, threads: int) -> Callable[[], object]:
    """ggml's product of ``x`` with ``weight`` stored as ``kind``, through the wheel's C symbols."""
    lib = ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)  # type: ignore[union-attr,arg-type]
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

    class Parameters(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", pointer), ("no_alloc", ctypes.c_bool)]

    for name, restype, argtypes in (
        ("init", pointer, [Parameters]),
        ("new_tensor_2d", pointer, [pointer, integer, long, long]),
        ("mul_mat", pointer, [pointer, pointer, pointer]),
        ("new_graph", pointer, [pointer]),
        ("build_forward_expand", None, [pointer, pointer]),
        ("graph_compute_with_ctx", integer, [pointer, pointer, integer]),
        ("get_data", pointer, [pointer]),
        ("quantize_chunk", ctypes.c_size_t, [integer, pointer, pointer, long, long, long, pointer]),
    ):
        function = getattr(lib, f"ggml_{name}")
        function.restype, function.argtypes = restype, argtypes
    rows, width = weight.shape
    context = lib.ggml_init(Parameters(rows * width * 3 + (64 << 20), None, False))
    stored = lib.ggml_new_tensor_2d(context, kind, width, rows)
    tokens = lib.ggml_new_tensor_2d(context, GGML_F32, width, x.shape[0])
    lib.ggml_quantize_chunk(kind, weight.data_ptr(), lib.ggml_get_data(stored), 0, rows, width, None)
    ctypes.memmove(lib.ggml_get_data(tokens), x.data_ptr(), x.nbytes)
    graph, product = lib.ggml_new_graph(context), lib.ggml_mul_mat(context, stored, tokens)
    lib.ggml_build_forward_expand(graph, product)
    return lambda: lib.ggml_graph_compute_with_ctx(context, graph, threads)


if __name__ == "__main__":
    typer.run(main)
