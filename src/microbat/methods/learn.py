"""The one training loop: a block's quantized output is pulled towards its float output.

AdamW with cosine decay over the calibration sequences (paper, section 4.1.2). The objective is either the paper's mean
squared error (eq. 5), or relative to each token's own energy, so that the few tokens with massive activations do not own
the loss (LOG.md has what that is worth).
"""

# Shapes: S sequences, L tokens, K width; a batch is [S, L, K].

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from microbat.methods.base import BlockData

Objective = Literal["mse", "relative", "stream"]
Inputs = Literal["quantized", "float"]


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


def train(
    data: BlockData,
    function: Callable[[Tensor], Tensor],
    groups: list[tuple[list[nn.Parameter], float]],
    schedule: Schedule,
) -> list[float]:
    """Train ``groups`` of (parameters, learning rate) so that ``function(inputs)`` meets the targets; loss per step.

    Raises FloatingPointError, naming the block, when the loss stops being finite.
    """
    groups = [(parameters, lr) for parameters, lr in groups if parameters]
    if not groups or schedule.epochs == 0:
        return []
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": lr} for parameters, lr in groups], weight_decay=0.0, fused=True
    )
    inputs = data.inputs if schedule.inputs == "quantized" else data.float_inputs
    num = inputs.shape[0]
    steps = schedule.epochs * math.ceil(num / schedule.batch)
    floor = schedule.min_lr_ratio
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    losses: list[float] = []
    for _ in range(schedule.epochs):
        for rows in torch.randperm(num, generator=data.generator).split(schedule.batch):
            output = function(inputs[rows])
            loss = block_loss(output, data.targets[rows], data.float_inputs[rows], inputs[rows], schedule.objective)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cosine.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"block {data.index}: the loss is {losses[-1]} after {len(losses)} steps")
            data.progress(len(losses) / steps, losses[-1])
    return losses
