"""Does a folder still hold what calibration chose, and does an engine compute it? Bits, layers, logits.

1. Every stored tensor is read and its digest compared with the one written with it; an export's codes are decoded and
   compared with the codes that calibration chose. Exact; the error names file and tensor.
2. Each quantized linear layer: what the engine made of the layer's input (microbat's own runtime: from the packed bits),
   against what calibration's layer, its weight as floats, makes of the same input in the same precision, by the relative
   error of the output. Bounded by ``LAYER_BOUND``, what one rounding of the output and sums in another order cost; a
   dropped transform, clip or activation format, or another scale rule costs 10 to 1000 times as much.
3. The logits against the calibrated model's, by the mean KL divergence. Low-bit activations turn a rounding in the last
   place into another code, so that a model of 4-bit activations differs from itself, computed in float32 and in bfloat16,
   by half a nat and more: that distance, measured on the spot, is the bound, with :data:`DEVIATIONS` standard errors of its
   mean over the tokens, since what is compared is such a distance too; twice that for an engine whose sums have an order of
   their own, since it and the reference are then two such models. It is loose where the second test is tight.

The calibrated model is, for microbat's own runtime, what calibration itself computed (``proof.safetensors``), where that
does not depend on what was computed with it, as it does where activations share one scale of a whole call (NVFP4); for those
and for other engines calibration's layers on the decoded codes, in the engine's own dtype and with the roundings that its
products have.
"""

# Shapes: L tokens, K width, N out, V vocabulary.

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from microbat.engines.base import Run, engines
from microbat.engines.microbat import Microbat
from microbat.engines.transformers import Transformers
from microbat.evaluation.text import load_text
from microbat.export import compressed_tensors, folder
from microbat.export.targets import LAYOUT, TARGETS, format_reasons
from microbat.formats.block import BlockFormat
from microbat.linear import QuantLinear, SiteInput
from microbat.models.checkpoint import Checkpoint, resolve
from microbat.quantizers.base import AbsMax
from microbat.registry import instances, pick
from microbat.runtime.load import assemble, load_dequantized

LAYER_BOUND = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # relative error of a layer's output
FLOOR = 1e-6  # nats; what summing in another order costs a model of 16-bit activations in float32
DEVIATIONS = 4
TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was compared: ``layers`` linear layers' codes, equal bit for bit (anything else raises); the outputs of the
    engine's layers on equal inputs, the worst of which is off by ``error`` (None: the engine does not show its layers);
    its logits, ``divergence`` nats from the calibrated model's."""

    engine: str
    layers: int
    worst: str | None
    error: float | None
    error_bound: float
    tokens: int
    divergence: float
    divergence_bound: float

    @property
    def passed(self) -> bool:
        return (self.error is None or self.error <= self.error_bound) and self.divergence <= self.divergence_bound


class Altered(ValueError):
    """The stored tensors are not those that were written."""


def verify(path: str | Path, *, engine: str = "") -> Verdict:
    """Compare the folder ``path``, ours or an export of ours, with the calibrated model, run by ``engine``.

    ``engine`` by default is microbat for a microbat folder, transformers for an export. Raises :class:`Altered` where a
    tensor is missing or not what was written, ValueError for another kind of folder or an unknown engine, ImportError
    for an engine that is not installed.
    """
    path = resolve(path)
    exported = compressed_tensors.is_exported(path)
    activations = None if exported else folder.read_contract(path)["activations"]
    chosen = pick("engine", engine or (Transformers.name if exported else Microbat.name), engines())()
    if exported:
        _check_engine(path, chosen.name)
    source = partial(_exported, path) if exported else partial(load_dequantized, path)
    model = lambda dtype: _rounding(source(dtype=dtype), chosen.activations)  # noqa: E731
    try:
        exact = model(dtype=torch.float32)
        proof = folder.read_proof(path)
    except ValueError as error:
        raise Altered(str(error)) from error
    rounded = model(dtype=torch.bfloat16)
    sample = {"input_ids": _tokens(path)[None]} if proof is None else proof[0]
    tokens, images = sample["input_ids"][0], {name: t for name, t in sample.items() if name != "input_ids"}
    layers = [name for name, module in exact.named_modules() if isinstance(module, QuantLinear)]
    try:
        run = chosen.run(path, tokens, layers, images)
    except ImportError as error:
        raise ImportError(f"engine {chosen.name!r} is not installed ({error}): {chosen.install}") from error
    distance = _divergence(_logits(exact, sample), _logits(rounded, sample))
    spread = DEVIATIONS * distance.std(correction=0) / math.sqrt(len(distance))
    divergence_bound = max(FLOOR, chosen.roundings * (distance.mean() + spread).item())
    reference = {torch.float32: exact, torch.bfloat16: rounded}.get(run.dtype) or model(dtype=run.dtype)
    expected = _logits(reference, sample)
    alone = (
        activations is None or not instances("microbat.formats", BlockFormat)[activations["format"]].has_tensor_scale
    )
    if isinstance(chosen, Microbat) and proof is not None and alone:
        expected = _head(exact, Checkpoint(path, index=folder.INDEX), proof[1])
    errors = _layer_errors(reference, run)
    worst = max(errors, key=errors.__getitem__) if errors else None
    return Verdict(
        engine=chosen.name,
        layers=len(layers),
        worst=worst,
        error=errors[worst] if worst else None,
        error_bound=LAYER_BOUND[run.dtype],
        tokens=len(run.logits),
        divergence=_divergence(expected[-len(run.logits) :], run.logits).mean().item(),
        divergence_bound=divergence_bound,
    )


def _check_engine(path: Path, engine: str) -> None:
    """Raise ValueError where ``engine`` is not one that the export ``path`` was written for or computes alike."""
    said, target = compressed_tensors.read_exported(path), TARGETS.get(engine)
    if said.target in TARGETS and TARGETS[said.target].engine == engine:
        return
    if target is None or target.layout != LAYOUT:
        raise ValueError(
            f"{path} is an export in {LAYOUT}, which {engine} does not run; try --engine {Transformers.name}"
        )
    if reasons := format_reasons(target, {"weights": said.weights, "activations": said.activations}):
        raise ValueError(f"{path} was exported for {said.target}; {engine} would compute something else: {reasons[0]}")


def _rounding(model: nn.Module, activations: AbsMax | None) -> nn.Module:
    """``model`` with its 16-bit activations rounded as an engine's products do."""
    for module in model.modules():
        if isinstance(module, SiteInput) and module.quantizer is None:
            module.quantizer = activations
    return model


def _exported(path: Path, *, dtype: torch.dtype) -> nn.Module:
    return assemble(Checkpoint(path), compressed_tensors.read_blocks(path), dtype=dtype)


def _tokens(path: Path) -> Tensor:
    """Tokens [L] of a text that every Python has, for a folder from before proofs."""
    from transformers import AutoTokenizer

    text = load_text().text[: 16 * TOKENS]
    return torch.tensor(AutoTokenizer.from_pretrained(path)(text).input_ids[:TOKENS])


@torch.no_grad()
def _layer_errors(reference: nn.Module, run: Run) -> dict[str, float]:
    """Layer -> relative error of the engine's output, on the input that the engine gave it."""
    errors = {}
    for name, ((x, *routed), y) in run.layers.items():
        expected = reference.get_submodule(name)(x.cpu(), *routed).to(torch.float32)
        errors[name] = ((y.cpu().to(torch.float32) - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    return errors


@torch.no_grad()
def _logits(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    return model(**sample).logits[0].to(torch.float32)


@torch.no_grad()
def _head(model: nn.Module, checkpoint: Checkpoint, outputs: Tensor) -> Tensor:
    """Logits [L, V] of the last block's outputs [1, L, K]."""
    family = checkpoint.family
    return model.get_submodule(family.head)(model.get_submodule(family.norm)(outputs))[0]


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL divergence in nats of ``other`` from ``reference``, logits [L, V], at each token: float64 [L]."""
    p, q = (logits.to(torch.float64).log_softmax(-1) for logits in (reference, other))
    return (p.exp() * (p - q)).sum(-1)
