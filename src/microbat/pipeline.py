"""The whole job, readable top to bottom: ``quantize`` a model into a folder, ``load`` it, ``write_report`` of it."""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from microbat import account, whole
from microbat.calibrate import coverage as calibration_coverage
from microbat.calibrate import data as calibration_data
from microbat.calibrate import pairs as image_pairs
from microbat.calibrate.coverage import Covered
from microbat.calibrate.data import Calibration
from microbat.calibrate.engine import calibrate, preflight
from microbat.calibrate.job import Job, Precision
from microbat.calibrate.memory import total_memory
from microbat.calibrate.outside import asked, rounded
from microbat.calibrate.workers import Workers
from microbat.documents import read_json, write_json
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.models.base import linear_layers
from microbat.models.checkpoint import Checkpoint, resolve
from microbat.models.padding import padded
from microbat.models.processor import Processor
from microbat.recipe import Recipe, describe, to_json
from microbat.report.page import write_page
from microbat.runtime.generate import generate as continuation
from microbat.runtime.load import load as load_folder
from microbat.unfinished import RUN_FILE, FolderKeeper, open_partial

SELF_CALIBRATION = "calibration 'self' is text that the model writes (a file or a data set is not)"
TOKENS_FILE = "calibration.safetensors"


def quantize(model: str | Path, *, out: str | Path, workers: int = 1, address: str = "", **fields: Any) -> Path:
    """Quantize ``model`` (a folder or a name on the hub) into the folder ``out``; ``fields`` are those of a Recipe, the others as
    in :func:`run`."""
    return run(Recipe(model=str(model), **fields), out, workers=workers, address=address)


def check(recipe: Recipe) -> Checkpoint:
    """The model of ``recipe``; raises ValueError for whatever is wrong with the request, before anything is computed."""
    preparers, solver = recipe.methods()
    scheme = recipe.parsed_scheme()
    calibration_data.check_source(recipe.calibration)
    if scheme.weight is None:
        raise ValueError(f"scheme {recipe.scheme!r} leaves weights in 16 bits: there is nothing to quantize")
    checkpoint = Checkpoint(resolve(recipe.model))
    if checkpoint.quant_method is not None:
        raise ValueError(f"{checkpoint.path} is quantized already ({checkpoint.quant_method}); give the float model")
    family = checkpoint.family
    for preparer in preparers:
        missing = [kind for kind in preparer.needs if not any(getattr(site, kind) for site in family.sites)]
        if missing:
            raise ValueError(
                f"method {preparer.name!r} cannot act on family {family.name!r}: none of its sites is {missing[0]} "
                "(microbat.models.base.Site). Choose another method, or say so in the family's file if one is."
            )
    if image_pairs.are_pairs(recipe.calibration):
        image_pairs.check(recipe.calibration, checkpoint)
    model = checkpoint.skeleton()
    wanted = {
        stack
        for stack, name in checkpoint.blocks
        if not all(scheme.ignores(f"{name}.{path}") for path in linear_layers(stack, model.get_submodule(name)))
    }
    unreached = [stack for stack in family.towers if stack in wanted and not image_pairs.are_pairs(recipe.calibration)]
    if unreached:
        raise ValueError(
            f"calibration {recipe.calibration!r} is text, which does not reach {unreached[0].blocks}: give --calibration a "
            f"folder of images with a .jsonl, or leave them in float with --ignore 're:^{re.escape(unreached[0].blocks)}'"
        )
    blocks = (role.format.block for role in (scheme.weight, scheme.activation) if role is not None)
    checkpoint = padded(checkpoint, wanted, math.lcm(*(block or 1 for block in blocks)))
    preflight(checkpoint, scheme, (*preparers, solver))
    asked(checkpoint, scheme)
    for preparer in preparers:
        if preparer.whole_model:
            what = f"method {preparer.name!r} {preparer.whole_model.why}"
            _check_fits(what, 4 * preparer.whole_model.copies, checkpoint, pick_device(recipe.device))
    return checkpoint


def _check_fits(what: str, size: int, checkpoint: Checkpoint, device: torch.device) -> None:
    """Raise ValueError where the whole model, ``size`` bytes a number, is more than all the memory of ``device``."""
    needed, there = size * checkpoint.num_parameters, total_memory(device)
    if needed > there:
        raise ValueError(
            f"{what}; the whole model has to be in memory for that: {needed / 1e9:.1f} GB, and {device} has {there / 1e9:.1f} GB"
        )


def in_order(recipe: Recipe) -> str:
    """Why blocks are calibrated one after the other, in a sentence; empty where workers can prepare them side by side."""
    preparers, solver = recipe.methods()
    for method in preparers:
        if method.in_order:
            return f"{method.name} {method.in_order}"
    return "" if preparers else f"{solver.name} trains nothing"


def coverage(recipe: Recipe) -> list[Covered]:
    """What ``recipe`` will quantize, layer by layer, and why not the rest; raises as :func:`check` does."""
    return calibration_coverage.coverage(check(recipe), recipe.parsed_scheme())


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    tokens: Path | None = None,
    title: str = "",
    workers: int = 1,
    address: str = "",
) -> Path:
    """Quantize ``recipe.model`` into the folder ``out`` and return it.

    Work in progress lies in ``<out>.partial``; a run that was interrupted goes on at the block where it stopped.
    ``tokens`` is a file of calibration tokens, as :func:`write_tokens` makes it, instead of tokens of this run's own.
    ``title`` stands before the progress bar. ``workers`` processes of this machine, or of the Ray cluster at ``address``, prepare
    blocks side by side where the recipe allows it (:func:`in_order`); the bytes are those of one.
    Raises ValueError for whatever is wrong with the request, before anything is computed.
    """
    started = time.perf_counter()
    out = Path(out)
    if out.exists():
        raise ValueError(f"output folder {out} exists; choose another or remove it")
    checkpoint = check(recipe)
    preparers, solver = recipe.methods()
    scheme = recipe.parsed_scheme()
    crew = None if in_order(recipe) else Workers.of(workers, address)
    device = pick_device(recipe.device)
    partial = out.with_name(out.name + ".partial")
    tokens_file = tokens or partial / TOKENS_FILE
    if recipe.calibration == "self" and not tokens_file.is_file():
        _check_fits(SELF_CALIBRATION, 2, checkpoint, device)
    open_partial(partial, recipe, checkpoint)
    calibration = _calibration(recipe, checkpoint, tokens_file, device)
    job = Job(
        checkpoint=checkpoint,
        scheme=scheme,
        preparers=preparers,
        solver=solver,
        tokens=calibration.tokens,
        pairs=calibration.pairs,
        seed=recipe.seed,
        precision=_precision(recipe.precision, device),
        device=device,
        min_expert_tokens=recipe.min_expert_tokens,
        scratch=partial,
    )
    turned, rotated = whole.rotated(job, _progress)
    job = dataclasses.replace(job, checkpoint=turned)
    keeper = FolderKeeper(partial)
    ahead = crew and crew.ahead(keeper.has)
    with _progress(title or f"{recipe.method} {scheme.text}", len(job.checkpoint.blocks)) as progress:
        records = account.most_telling(calibrate(job, keeper, account.picture, progress, ahead))
    checkpoint = job.checkpoint
    outside = rounded(checkpoint, scheme)
    distilled = whole.distilled(job, outside, _progress)
    beside = (name for name in checkpoint.names if not checkpoint.in_block(name))
    floats = {name: checkpoint.tensor(name) for name in beside if name.removesuffix(".weight") not in outside.weights}
    shards.write_other(partial / folders.OTHER_SHARD, floats, outside)
    made = {
        "recipe": to_json(recipe),
        "methods": [describe(m) for m in (*preparers, solver)],
        "calibration_fingerprint": calibration.fingerprint,
        **({"calibration_skipped": list(calibration.skipped)} if calibration.skipped else {}),
        "precision": job.precision,
        "versions": account.versions(),
    }
    others = sum(tensor.numel() for tensor in floats.values())
    report = account.report(recipe, job, records, outside, others, partial, made, time.perf_counter() - started)
    report |= {"rotation": rotated, "distillation": distilled}
    folders.finish(
        partial,
        out,
        checkpoint,
        account.contract(scheme),
        {"recipe.json": made, "report.json": report},
        [
            partial / RUN_FILE,
            *([] if tokens else [partial / TOKENS_FILE]),
            *partial.glob(whole.ROTATION_FILE),
            *partial.glob(whole.DISTILLED_FILE),
            *keeper.record_files(),
        ],
    )
    return out


def write_tokens(recipe: Recipe, file: Path) -> None:
    """Make the calibration tokens of ``recipe`` in ``file``, for runs that share them, where it is not there yet."""
    if not file.is_file():
        checkpoint, device = Checkpoint(resolve(recipe.model)), pick_device(recipe.device)
        if recipe.calibration == "self":
            _check_fits(SELF_CALIBRATION, 2, checkpoint, device)
        _calibration(recipe, checkpoint, file, device)


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
) -> nn.Module:
    """A runnable model: from a microbat folder, its linear layers running from their bits in ``backend``, or a float model
    from its folder or the hub."""
    path = resolve(folder)
    if folders.is_microbat_folder(path):
        return load_folder(path, dtype=dtype, device=device, backend=backend)
    return Checkpoint(path).pretrained(dtype).to(device).eval()  # a damaged checkpoint shows here, with its name


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    show: Callable[[str], None] = lambda piece: None,
) -> str:
    """The greedy continuation of ``prompt`` by ``model`` (a folder or a name on the hub), loaded as by :func:`load`; ``show``
    gets it piece by piece.

    Raises ValueError for a prompt that is empty or longer than the context.
    """
    loaded = load(model, dtype=dtype, device=pick_device(device), backend=backend)
    return continuation(loaded, tokenizer_of(model), prompt, max_new_tokens=max_new_tokens, show=show)


def tokenizer_of(model: str | Path) -> Any:
    """The tokenizer of a folder or a model on the hub; ValueError for one that is code of the hub's."""
    from transformers import AutoTokenizer

    path = resolve(model)
    settings = path / "tokenizer_config.json"
    own = read_json(settings).get("auto_map", {}).get("AutoTokenizer") if settings.is_file() else None
    if own is not None:
        raise ValueError(
            f"the tokenizer of {path} is code of its own ({own}), which is not run; put a tokenizer.json beside it and take "
            "auto_map and tokenizer_class out of tokenizer_config.json"
        )
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def processor_of(model: str | Path) -> Processor:
    """What makes a picture with a prompt the inputs of a folder's model or one on the hub."""
    return Processor(resolve(model))


def attach(folder: str | Path, evaluation: dict[str, Any]) -> None:
    """Renew the report of ``folder`` with ``evaluation`` where it is a microbat folder; leave others alone."""
    path = Path(folder)
    if path.is_dir() and folders.is_microbat_folder(path):
        write_report(path, evaluation)


def write_report(folder: str | Path, evaluation: dict[str, Any] | None = None) -> Path:
    """Write ``report.html`` into a microbat folder, with ``evaluation`` (from :func:`microbat.evaluate`) kept in report.json."""
    folder = Path(folder)
    folders.read_contract(folder)
    content = account.read_report(folder)
    if evaluation is not None:
        content["evaluation"] = evaluation
        write_json(folder / "report.json", content)
    return write_page(content, folder / "report.html")


def _calibration(recipe: Recipe, checkpoint: Checkpoint, file: Path, device: torch.device) -> Calibration:
    """The calibration tokens or pairs: those in ``file``, or made now and kept there for the next run."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not file.is_file():
        count, length = recipe.num_calibration_samples, recipe.max_seq_length
        generator = torch.Generator().manual_seed(recipe.seed)
        if image_pairs.are_pairs(recipe.calibration):
            pairs, skipped = image_pairs.samples(
                recipe.calibration, checkpoint, count, length, generator, skip_bad=recipe.skip_bad
            )
            made = Calibration(pairs=pairs, skipped=skipped, source=recipe.calibration)
        elif recipe.calibration == "self":
            with _progress("writing calibration text", 1) as progress:
                made = calibration_data.from_model(
                    checkpoint, count, length, recipe.seed, device, lambda share: progress(0, share, 0.0)
                )
        else:
            tokenizer = tokenizer_of(checkpoint.path)
            made = calibration_data.from_text(recipe.calibration, tokenizer, count, length, generator)
        save_file(made.tensors(), file.with_suffix(".tmp"), {"skipped": json.dumps(made.skipped)})
        os.replace(file.with_suffix(".tmp"), file)
    with safe_open(file, framework="pt") as kept:
        tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        skipped = json.loads((kept.metadata() or {}).get("skipped", "[]"))
    return Calibration.of(tensors, recipe.calibration, tuple(skipped))


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is a GPU where torch sees one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not there (torch sees no GPU); allowed: cpu, auto")
    return torch.device(name)


def _precision(name: str, device: torch.device) -> Precision:
    """bfloat16 where the hardware multiplies it: codes times power-of-two scales are exact in it."""
    if name == "auto":
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "bfloat16" if fast else "float32"
    return "float32" if name == "float32" else "bfloat16"


@contextlib.contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int, float, float], None]]:
    """A progress bar with an ETA; yields ``update(index, share of it done, loss)``."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task(title, total=total, loss="")

        def update(index: int, share: float, loss: float) -> None:
            bar.update(task, completed=index + share, loss=f"loss {loss:.4g}" if loss else "")

        yield update
