"""The account that a run gives of itself: the folder's contract, what its report says, which layers are pictured."""

import math
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microbat.calibrate.job import Job, Record
from microbat.calibrate.memory import peak_memory
from microbat.documents import read_json
from microbat.export import folder as folders
from microbat.linear import QuantBlock
from microbat.methods.base import Quant
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import clipped
from microbat.recipe import Recipe
from microbat.report.activations import activation_record
from microbat.scheme import Scheme

# Entries of report.json that commands read.
READ = (
    "model",
    "family",
    "method",
    "solver",
    "scheme",
    "recipe",
    "bits_per_weight",
    "bytes",
    "layers",
    "blocks",
    "activations",
)
PICTURED_LAYERS = 3  # worst activations that the report shows, beside the one that every run shows


def contract(scheme: Scheme) -> dict[str, Any]:
    """What whoever runs the folder has to compute, as its config.json says it."""

    def role(quantizer: Any) -> dict[str, str] | None:
        if quantizer is None:
            return None
        exception = {} if quantizer.format.element.ties == "even" else {"rounding": "nearest, ties away from zero"}
        return {"format": quantizer.format.name, "scale_rule": quantizer.rule, **exception}

    return {
        "scheme": scheme.text,
        "weights": role(scheme.weight),
        "activations": role(scheme.activation),
        "kv_cache": role(scheme.cache),
        "ignore": list(scheme.ignore),
    }


def report(
    recipe: Recipe,
    job: Job,
    records: list[Record],
    outside: QuantBlock,
    others: int,
    partial: Path,
    made: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """report.json: ``outside`` are the codes outside the blocks, ``others`` how many numbers lie there in float."""
    layers = [layer for record in records for layer in record.layers]
    around = [
        {"name": name, "shape": list(q.shape), "format": q.format.name, "bits": 8 * q.nbytes / math.prod(q.shape)}
        for name, q in outside.weights.items()
    ]
    weights = sum(math.prod(layer["shape"]) for layer in (*layers, *around))
    code_bytes = round(sum(layer["bits"] * math.prod(layer["shape"]) / 8 for layer in (*layers, *around)))
    online_bytes = folders.online_bytes(partial)
    total = sum(file.stat().st_size for file in partial.glob("microbat-*.safetensors"))
    pictures = _worst(records)
    pictures += [p for p in records[-1].activations[-1:] if p not in pictures]
    role = {"weight": job.scheme.weight, "activation": job.scheme.activation, "kv_cache": job.scheme.cache}
    return {
        "microbat": made["versions"]["microbat"],
        "model": recipe.model,
        "family": job.checkpoint.family.name,
        "scheme": recipe.scheme,
        "method": recipe.method,
        "solver": job.solver.name,
        "recipe": made,
        "formats": {k: q and {"name": q.format.name, "scale_rule": q.rule} for k, q in role.items()},
        "bits_per_weight": 8 * (code_bytes + online_bytes) / weights,
        "bytes": {
            "quantized_layers": code_bytes,
            "transforms": online_bytes,
            "other": total - code_bytes - online_bytes,
            "total": total,
            "bf16_total": 2 * (weights + others),
        },
        "layers": layers,
        "outside": around,
        "blocks": [{k: v for k, v in vars(record).items() if k not in ("layers", "activations")} for record in records],
        "activations": pictures,
        "machine": machine(job.device),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
    }


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of ``folder``. Raises ValueError, naming file and entry, where it is not what :func:`report` made."""
    content = read_json(folder / "report.json")
    for name in READ:
        if name not in content:
            raise ValueError(f"{folder / 'report.json'}: entry {name!r} is missing; microbat did not write it so")
    return content


def calibration_seconds(report: dict[str, Any]) -> float:
    """What calibration took, however often it was interrupted: the blocks, and what was done to the whole model."""
    stages = [*report["blocks"], report.get("rotation"), report.get("distillation")]
    return sum(stage["seconds"] for stage in stages if stage)


def most_telling(records: Iterator[Record]) -> list[Record]:
    """All records, with the pictures of the worst layers and of the last block alone: a model has many blocks."""
    kept: list[Record] = []
    for record in records:
        worst = _worst(kept)
        for earlier in kept:
            earlier.activations = [picture for picture in earlier.activations if picture in worst]
        kept.append(record)
    return kept


def _worst(records: list[Record]) -> list[dict[str, Any]]:
    """The pictures of the layers whose outputs are furthest off."""
    errors = {layer["name"]: layer["output_error"] for record in records for layer in record.layers}
    pictures = (picture for record in records for picture in record.activations)
    return sorted(pictures, key=lambda picture: -errors[picture["layer"]])[:PICTURED_LAYERS]


def picture(layer: str, before: Tensor, after: Tensor, quantizer: Quant) -> dict[str, Any]:
    """What the report shows of one activation, before and after its transform."""
    inner = quantizer if isinstance(quantizer, AbsMax) else quantizer.inner
    after = clipped(quantizer, after)
    return activation_record(
        layer,
        before,
        after,
        inner.scales(before).product,
        inner.scales(after).product,
        inner.format.grid.tolist(),
        inner.format.block_of(before.shape[-1]),
    )


def machine(device: torch.device) -> str:
    """What a run took its time on: a GPU by name, or the processor and how many of its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def processor() -> str:
    """The CPU's name, as the system knows it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of whatever decides the bytes."""
    import safetensors
    import transformers

    return {
        "microbat": version("microbat"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
