"""Experts in calibration: how many tokens each saw, and codes expert by expert for solvers that ask for statistics.

The router decides how much of the calibration text an expert sees, and may send it next to nothing. Statistics of n tokens are
noise where n is small, and GPTQ on noise loses to round to nearest (LOG.md): an expert below the floor of f tokens gets the mean
over f tokens of which f - n are average tokens of the block, as if the router had sent them here,

    H = (n H_own + (f - n) H_all) / f,   n < f

with H_all over all tokens of the block through this very expert (for down, what its own gate and up make of them: experts share
no inner channels, so nothing of another expert's could stand in). f is ``min_expert_tokens``, by default four times the width of
the experts' widest input. H of several experts are in memory at once, as many as
``HESSIAN_BYTES`` hold; each such group costs a pass through the block up to the experts, and so do ``k`` experts below the
floor, k what the router chooses for a token. The solver then takes one expert after the other, so that one factor of an H is in
memory instead of all.
"""

# Shapes: E experts, N out, K in, T tokens, k experts a token.

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from microbat.calibrate.stats import Hessian
from microbat.experts import Experts, Routed
from microbat.methods.base import Quant, Solution, Solver, Statistics

HESSIAN_BYTES = 1 << 30
TOKENS_PER_CHANNEL = 4  # LOG.md


def floor_of(module: Experts, min_tokens: int | None) -> int:
    """How many tokens the statistics of each expert of ``module`` are of at least; ``min_tokens`` None: by their width."""
    return TOKENS_PER_CHANNEL * module.width if min_tokens is None else min_tokens


@contextlib.contextmanager
def counted(block: nn.Module) -> Iterator[list[int]]:
    """The number of tokens that each expert of ``block`` gets until the context ends; empty for a block without experts."""
    counts: list[int] = []
    with contextlib.ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, Experts):
                counts[:] = [0] * module.num_experts
                stack.enter_context(_before(module, lambda inputs: _count(counts, inputs[1])))
        yield counts


def _count(counts: list[int], index: Tensor) -> None:
    more = torch.bincount(index.flatten(), minlength=len(counts)).tolist()
    counts[:] = [count + new for count, new in zip(counts, more, strict=True)]


def solve_experts(
    solver: Solver,
    weights: dict[str, Tensor],
    quantizers: dict[str, Quant],
    hessians: Callable[[list[int]], list[Tensor]],
) -> dict[str, Solution]:
    """Codes of the weights [E, N, K] that read one activation, by path; ``hessians`` gives those [K, K] of some experts.

    A note of an expert's solution is that of the expert with the largest.
    """
    if solver.takes_stacks:
        return solver.solve_site(weights, quantizers, None)
    num_experts, _, width = next(iter(weights.values())).shape
    solved: dict[str, list[Solution]] = {path: [] for path in weights}
    for experts in torch.arange(num_experts).split(max(1, HESSIAN_BYTES // (8 * width**2))):
        numbers = experts.tolist()
        own = hessians(numbers) if "hessian" in solver.needs else [None] * len(numbers)
        for expert, hessian in zip(numbers, own, strict=True):
            statistics = None if hessian is None else Statistics(hessian=hessian)
            one = {path: quantizer.of_one(expert) for path, quantizer in quantizers.items()}
            answer = solver.solve_site({path: w[expert] for path, w in weights.items()}, one, statistics)
            for path, solution in answer.items():
                solved[path].append(solution)
    return {path: _stacked(solutions) for path, solutions in solved.items()}


def _stacked(solutions: list[Solution]) -> Solution:
    weights: list[Any] = [solution.weight for solution in solutions]
    notes = {key: max(solution.notes[key] for solution in solutions) for key in solutions[0].notes}
    return Solution(weight=type(weights[0]).stack(weights), notes=notes)


def expert_hessians(
    module: Experts,
    run: Callable[[Callable[[Tensor, Routed], None]], None],
    quantized: Callable[[Tensor], Tensor],
    width: int,
    experts: list[int],
    *,
    floor: int,
    name: str,
) -> list[Tensor]:
    """X^T X / T [K, K] of each of ``experts``, mixed as above where it saw fewer than ``floor`` tokens.

    ``run(see)`` runs the block up to the layer and calls ``see`` with what each batch gives it; ``quantized`` makes of that what
    the weights meet. Raises ValueError for an expert that saw no token where ``floor`` is 0.
    """
    device = module.down_proj.weight.device
    dealt = False  # whether the layer's input is the block's, of which each expert gets some rows

    def gather(numbers: list[int]) -> dict[int, Hessian]:
        sums = {number: Hessian(width, device) for number in numbers}

        def see(x: Tensor, routed: Routed) -> None:
            nonlocal dealt
            dealt = routed.rows is not None
            for total, rows in zip(sums.values(), routed.each(quantized(x), sums), strict=True):
                total.add(rows)

        run(see)
        return sums

    own = gather(experts)
    unseen = [number for number, total in own.items() if total.tokens == 0]
    if unseen and floor == 0:
        raise ValueError(
            f"{name}: no calibration token reached expert{'s' * (len(unseen) > 1)} {', '.join(map(str, unseen))}, so nothing is "
            "known of its inputs. Calibrate on more text (num_calibration_samples, max_seq_length), or let "
            "min_expert_tokens be above 0: average tokens of the block then make up for what is missing"
        )
    tokens = {number: total.tokens for number, total in own.items()}
    low = [number for number in experts if tokens[number] < floor]
    means = {number: own.pop(number).mean for number in experts}
    size = max(1, len(low)) if dealt else module.num_chosen
    for some in (low[i : i + size] for i in range(0, len(low), size)):
        alike = some[:1] if dealt else some  # all tokens of the block are the same ones for all experts
        with _before(module, lambda inputs, alike=alike: _to_all(inputs, alike)):
            everyone = gather(alike)
        for number in some:
            total = everyone[some[0] if dealt else number].mean
            means[number] = (tokens[number] * means[number] + (floor - tokens[number]) * total) / floor
    return list(means.values())


def _to_all(inputs: tuple[Tensor, Tensor, Tensor], experts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of an experts module with every token sent to each of ``experts``."""
    hidden, index, weights = inputs
    everywhere = torch.tensor(experts, device=index.device).expand(len(index), -1)
    return hidden, everywhere, weights.new_zeros(everywhere.shape)


@contextlib.contextmanager
def _before(module: nn.Module, see: Callable[[Any], Any]) -> Iterator[None]:
    """Call ``see`` with the inputs of every call of ``module``; what it returns replaces them."""
    handle = module.register_forward_pre_hook(lambda _, inputs: see(inputs))
    try:
        yield
    finally:
        handle.remove()
