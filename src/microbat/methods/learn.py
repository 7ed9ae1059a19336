"""The training loop of a block: its quantized output is pulled towards its float output.

AdamW with cosine decay over the calibration sequences (paper, section 4.1.2). The objective is either the paper's mean
squared error (eq. 5), or relative to each token's own energy, so that the few tokens with massive activations do not own
the loss (LOG.md has what that is worth).
"""

# Shapes: S sequences, L tokens, K width; a batch is [S, L, K].

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from microbat.formats.block import QTensor
from microbat.methods.base import BlockData, Plan, Quant, Rounding, Solver
from microbat.models.base import Site
from microbat.quantizers.clip import Clip
from microbat.scheme import Scheme

Objective = Literal["mse", "relative", "stream"]
Inputs = Literal["quantized", "float", "mixed"]  # mixed: each number from one of the two, drawn anew at every step
IN_ORDER: dict[Inputs, str] = {  # why blocks cannot train side by side
    inputs: f"trains each block on what the quantized blocks before it make (inputs={inputs}; inputs=float does not)"
    for inputs in ("quantized", "mixed")
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how to train one block."""

    epochs: int
    batch: int
    objective: Objective
    inputs: Inputs
    min_lr_ratio: float = 1e-3  # FlatQuant's floor of the cosine


def block_loss(output: Tensor, target: Tensor, source: Tensor, given: Tensor, objective: Objective) -> Tensor:
    """Scalar loss between block outputs [S, L, K]; ``source`` is the float block's input, ``given`` what it got.

    ``mse`` is the paper's eq. 5. The others divide each token's squared error by an energy of that token: ``stream`` by
    its target's, ``relative`` by the block's update plus the error that arrived, the loss of leaving the token as it is.
    """
    error = (output.to(torch.float32) - target).square().sum(-1)
    if objective == "mse":
        return error.mean() / target.shape[-1]
    energy = target.square().sum(-1)
    if objective == "relative":
        energy = (target - source).square().sum(-1) + (given - source).square().sum(-1)
    return (error / energy.clamp(min=1e-12)).mean()


def check_trains(name: str, scheme: Scheme) -> None:
    """Raise ValueError where the gradient of ``scheme``'s weights is not known."""
    if scheme.weight is not None and scheme.weight.format.terms:
        raise ValueError(
            f"{name} trains through its quantizers, and {scheme.weight.format.name} has no gradient for its offset or further "
            f"scales (scheme {scheme.text}); choose gptq, gptaq, d2quant or pt2llm, or a format of 4 bits"
        )


def train_plan(
    data: BlockData,
    plan: Plan,
    solver: Solver,
    *,
    lr: float,
    clip_lr: float,
    schedule: Schedule,
    rounding: Rounding = "fake",
) -> None:
    """Train the transforms (at ``lr``) and clips (at ``clip_lr``) of ``plan``, and the weights if ``solver`` asks for it.

    ``rounding``: of the weights meanwhile. Leaves weights that trained in ``plan.latents`` and the loss of each step in
    ``plan.loss``.
    """
    weights = {path: data.block.get_submodule(path).weight for site in plan.sites for path in site.weights}
    maps, clips = online(plan)
    folded = [site.scale for site in plan.sites if site.scale is not None]
    folded += [] if plan.values is None else plan.values.parameters()
    clips += learnable(quantizer for site in plan.sites for quantizer in site.weights.values())
    groups: list[tuple[list[nn.Parameter], float]] = [(folded, lr), (maps, lr), (clips, clip_lr)]
    if solver.weight_lr is not None:
        weights = {path: nn.Parameter(weight.clone()) for path, weight in weights.items()}
        groups += [([w], solver.weight_lr * w.detach().square().mean().sqrt().item()) for w in weights.values()]
    plan.loss = train(data, data.faked(plan, weights, rounding=rounding), groups, schedule)
    if solver.weight_lr is not None:
        plan.latents = {path: w.detach() for path, w in weights.items()}
    fold(data.block, plan)


def refine_plan(
    data: BlockData, plan: Plan, codes: dict[str, QTensor], *, lr: float, clip_lr: float, schedule: Schedule
) -> None:
    """Train the transforms and clips of ``plan`` once more, on the side of the activations alone: weights are ``codes``.

    A transform then no longer is the exact inverse of what the weights were rounded in; it undoes a part of their error.
    """
    maps, clips = online(plan)
    for parameter in maps:
        parameter.requires_grad_()
    weights = {path: tensor.dequantize() for path, tensor in codes.items()}
    function = data.faked(plan, weights, rounding="done")
    plan.loss += train(data, function, [(maps, lr), (clips, clip_lr)], schedule)


def online(plan: Plan) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What learns of all that happens to activations and the cache when the model runs: transforms, and clips."""
    transforms = [*(site.transform for site in plan.sites), plan.kv and plan.kv.transform]
    quantizers = [*(site.activation for site in plan.sites), *((plan.kv.key, plan.kv.value) if plan.kv else ())]
    return [p for transform in transforms if transform is not None for p in transform.parameters()], learnable(
        quantizers
    )


def learnable(quantizers: Iterable[Quant | None]) -> list[nn.Parameter]:
    """The logits of those that are clips and still learn."""
    return [q.logits for q in quantizers if isinstance(q, Clip) and q.logits is not None]


SMALLEST = 1e-5  # the floor of SmoothQuant's authors, and FlatQuant's, for both maxima


def channel_maxima(data: BlockData, sites: Sequence[Site]) -> list[tuple[Tensor, Tensor]]:
    """The largest magnitude of each channel [K] of each site: of the activation, and over its consumers' weights."""
    activations = data.absmax(site.consumers[0] for site in sites)
    weights = [[data.block.get_submodule(path).weight.flatten(0, -2) for path in site.consumers] for site in sites]
    return [
        (activations[site.consumers[0]], torch.stack([weight.abs().amax(0) for weight in own]).amax(0))
        for site, own in zip(sites, weights, strict=True)
    ]


def smoothing(x_max: Tensor, w_max: Tensor, alpha: float) -> Tensor:
    """What SmoothQuant multiplies activations with, 1 / s [K] = w_max^(1 - alpha) / x_max^alpha."""
    return w_max.clamp(min=SMALLEST) ** (1 - alpha) / x_max.clamp(min=SMALLEST) ** alpha


def start_scales(data: BlockData, plan: Plan, alpha: float) -> None:
    """Give each site whose producer can take it in a factor per channel [K], to be learned, that starts at
    :func:`smoothing`'s."""
    sites = [
        site
        for site in plan.sites
        if site.site.producer and not site.site.headed and set(site.weights) == set(site.site.consumers)
    ]
    for site, maxima in zip(sites, channel_maxima(data, [site.site for site in sites]), strict=True):
        site.scale = nn.Parameter(smoothing(*maxima, alpha))


@torch.no_grad()
def fold(block: nn.Module, plan: Plan) -> None:
    """Move scales and the map of the values into the weights around them: they cost nothing when the model runs."""
    linears = {path: block.get_submodule(path) for site in plan.sites for path in site.weights}
    biases = {path: linear.bias for path, linear in linears.items()}
    weights, biases = plan.folded({path: linear.weight for path, linear in linears.items()}, biases)
    plan.latents, _ = plan.folded(plan.latents, {})
    for path, linear in linears.items():
        linear.weight = nn.Parameter(weights[path], requires_grad=False)
        linear.bias = None if biases[path] is None else nn.Parameter(biases[path], requires_grad=False)
    for site in (site for site in plan.sites if site.scale is not None):
        if (
            site.site.producer not in linears
        ):  # a norm: its gain [K], and a bias; or a layer that stays in float: its rows
            producer = block.get_submodule(site.site.producer)
            for name, parameter in list(producer.named_parameters()):
                scale = site.scale if parameter.dim() == 1 else site.scale[:, None]
                setattr(producer, name, nn.Parameter(parameter * scale, requires_grad=False))
        for reader in (block.get_submodule(path) for path in site.site.readers):
            reader.weight = nn.Parameter(reader.weight / site.scale, requires_grad=False)
        site.scale = None
    plan.values = None


def train(
    data: BlockData,
    function: Callable[[Tensor, Tensor], Tensor],
    groups: list[tuple[list[nn.Parameter], float]],
    schedule: Schedule,
) -> list[float]:
    """Train ``groups`` of (parameters, learning rate) so that ``function(inputs, rows)`` meets the targets; loss per step.

    Raises FloatingPointError, naming the block, when the loss stops being finite.
    """
    groups = [(parameters, lr) for parameters, lr in groups if parameters]
    if not groups or schedule.epochs == 0:
        return []

    def loss(rows: Tensor) -> Tensor:
        inputs = drawn(data, rows, schedule.inputs)
        output = function(inputs, rows)
        return block_loss(output, data.targets[rows], data.float_inputs[rows], inputs, schedule.objective)

    draws = (torch.randperm(len(data.targets), generator=data.generator) for _ in range(schedule.epochs))
    batches = [rows for draw in draws for rows in draw.split(schedule.batch)]
    return descend(groups, batches, loss, schedule.min_lr_ratio, data.progress, f"block {data.index}")


def descend(
    groups: list[tuple[list[nn.Parameter], float]],
    batches: list[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    floor: float,
    progress: Callable[[float, float], None],
    what: str,
) -> list[float]:
    """AdamW on ``groups`` of (parameters, learning rate), a step for each batch of rows, down a cosine to ``floor``
    of the rates; the loss of each step. Raises FloatingPointError, saying in ``what``, when it stops being finite."""
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": lr} for parameters, lr in groups if parameters], weight_decay=0.0, fused=True
    )
    steps = len(batches)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    for rows in batches:
        loss = loss_of(rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        cosine.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"{what}: the loss is {losses[-1]} after {len(losses)} steps")
        progress(len(losses) / steps, losses[-1])
    return losses


def drawn(data: BlockData, rows: Tensor, inputs: Inputs) -> Tensor:
    """What a step sees of sequences ``rows``.

    The errors that arrive are what earlier blocks' roundings happened to be; trained on them as they are, a block learns to
    undo those very errors, and the model's next run, rounded otherwise somewhere, has others (LOG.md). Mixing keeps their
    size and takes their pattern away (QDrop, arXiv 2203.05740, does so within a block).
    """
    if inputs == "mixed":
        arrived = data.inputs[rows]
        take = torch.rand(arrived.shape, generator=data.generator) < 0.5
        return torch.where(take.to(arrived.device), arrived, data.float_inputs[rows])
    return data.inputs[rows] if inputs == "quantized" else data.float_inputs[rows]
