"""A report of a run that never was, with the shapes and the spread of a real one."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from microbat.report import activation_record

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1
BLOCK = 32


@pytest.fixture(scope="session")
def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(names)})")
    return found


@pytest.fixture(scope="session")
def make_report() -> Callable[..., dict]:
    """Builds a report: make_report(num_blocks=30, num_records=2)."""
    return _report


def _report(num_blocks: int = 30, num_records: int = 2) -> dict:
    """A complete report, as json.load would give it."""
    generator = torch.Generator().manual_seed(2)
    noise = torch.rand(num_blocks, len(KINDS), 2, generator=generator).tolist()
    layers = [
        {
            "name": f"model.layers.{index}.{path}",
            "block": index,
            "kind": path.split(".")[-1],
            "shape": list(shape),
            "format": "mxfp4",
            "bits": 4.25,
            "transform": "gpk(g=32, g1=8)",
            "transform_params": 64 + 16 * shape[1] // BLOCK,
            "weight_error": 0.009 + 0.004 * noise[index][kind][0],
            "output_error": (0.02 + 0.015 * kind)
            * (0.6 + noise[index][kind][1])
            * (1 + 3 * (index in (0, num_blocks - 1))),
        }
        for index in range(num_blocks)
        for kind, (path, shape) in enumerate(KINDS.items())
    ]
    blocks = [
        {
            "name": f"model.layers.{index}",
            "index": index,
            "error": 0.03 + 0.004 * index + 0.05 * (index == 0),
            "seconds": 12.3 + index / 7,
            "loss": [
                0.3 * (1 + index / 20) * (0.25 + 0.75 * 0.97**step) * (0.9 + 0.2 * noise[index][step % 7][0])
                for step in range(160)
            ],
        }
        for index in range(num_blocks)
    ]
    rows = (
        ("float", 22.55, 0.0, 1.0),
        ("rtn", 66.7, 1.21, 0.52),
        ("gptq", 51.2, 0.93, 0.58),
        ("batquant", 27.9, 0.24, 0.81),
    )
    return {
        "microbat": "0.1.0",
        "model": "SmolLM2-135M-Instruct",
        "family": "llama",
        "scheme": "W4A4KV16",
        "method": "batquant",
        "solver": "gptq",
        "recipe": {
            "seed": 0,
            "preparers": [{"name": "batquant", "g1": 8, "lr": 2e-3, "clip": True, "init": "hadamard"}],
            "solver": {"name": "gptq", "damping": 0.01, "order": None},
            "calibration": {"source": "self", "samples": 32, "length": 512},
        },
        "formats": {
            "weight": {"name": "mxfp4", "scale_rule": "even"},
            "activation": {"name": "mxfp4", "scale_rule": "even"},
            "kv": None,
        },
        "bits_per_weight": 4.27,
        "bytes": {
            "quantized_layers": 56_500_000,
            "other": 56_700_000,
            "transforms": 410_000,
            "total": 113_610_000,
            "bf16_total": 269_000_000,
        },
        "layers": layers,
        "blocks": blocks,
        "evaluation": {
            "text": "wikitext-2-raw test",
            "windows": 16,
            "window": 1024,
            "stride": 1024,
            "tokens": 16368,
            "rows": [dict(zip(("name", "perplexity", "kl", "top1"), row, strict=True)) for row in rows],
        },
        "activations": [_record(f"model.layers.{11 + index}.mlp.down_proj", generator) for index in range(num_records)],
        "seconds": 605.0,
        "peak_memory_bytes": 3_100_000_000,
    }


def _record(layer: str, generator: torch.Generator) -> dict:
    """Gaussian activations with outlier channels in two blocks; the transform is a Hadamard matrix."""
    num_tokens, num_channels = 100, 448
    before_TK = torch.randn(num_tokens, num_channels, generator=generator)
    before_TK[:, 3 * BLOCK + 5] *= 40
    before_TK[:, 9 * BLOCK + 1] += 25
    hadamard = torch.ones(1, 1)
    while len(hadamard) < BLOCK:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], dim=1), torch.cat([hadamard, -hadamard], dim=1)], dim=0)
    after_TK = (before_TK.unflatten(-1, (-1, BLOCK)) @ (hadamard / BLOCK**0.5)).flatten(-2)
    return activation_record(layer, before_TK, after_TK, _scale(before_TK), _scale(after_TK), GRID, BLOCK)


def _scale(x_TK: torch.Tensor) -> torch.Tensor:
    """Powers of two that bring a block's peak to between 4 and 8, as the floor rule does."""
    exponent_TG = torch.frexp(x_TK.unflatten(-1, (-1, BLOCK)).abs().amax(dim=-1)).exponent
    return torch.ldexp(torch.ones(exponent_TG.shape), exponent_TG - 3)
