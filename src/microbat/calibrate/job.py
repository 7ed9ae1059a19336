"""What calibration is asked for, what it gives back, and one block's data as methods see it."""

# Shapes: S sequences, L tokens, K width, R some of the sequences.

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from microbat.calibrate.fake import faked
from microbat.calibrate.inputs import watch
from microbat.calibrate.stream import Activations, Sample
from microbat.linear import QuantBlock
from microbat.methods.base import Plan, Preparer, Quant, Rounding, Solver
from microbat.models.base import Stack
from microbat.models.checkpoint import Checkpoint
from microbat.scheme import Scheme

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to calibrate and how, on ``tokens`` int64 [S, L] or, where there are any, on ``pairs`` of images and text.

    ``batch`` sequences run at once where nothing is trained. Activations that memory does not hold go below ``scratch``.
    Statistics of an expert that saw fewer than ``min_expert_tokens`` are filled up (:mod:`microbat.calibrate.experts`; None: by
    the experts' width).
    """

    checkpoint: Checkpoint
    scheme: Scheme
    preparers: tuple[Preparer, ...]
    solver: Solver
    tokens: Tensor
    seed: int
    precision: Precision
    device: torch.device
    scratch: Path
    batch: int = 4
    min_expert_tokens: int | None = None
    pairs: tuple[Sample, ...] = ()

    @property
    def first(self) -> Sample:
        """What the model is called with for the first sample."""
        return self.pairs[0] if self.pairs else {"input_ids": self.tokens[:1]}


@dataclass(kw_only=True)
class Record:
    """What happened to one block, as plain numbers; ``expert_tokens``: how many calibration tokens each of its experts got, and
    ``expert_floor``: below how many statistics of an expert are filled up."""

    name: str
    index: int
    error: float
    seconds: float
    loss: list[float]
    layers: list[dict[str, Any]]
    activations: list[dict[str, Any]] = field(default_factory=list)
    expert_tokens: list[int] = field(default_factory=list)
    expert_floor: int | None = None


class Keeper(Protocol):
    """Where finished blocks go, and come back from when a run is resumed, with their float tensors by name."""

    def has(self, index: int) -> bool: ...

    def load(self, index: int) -> tuple[QuantBlock, dict[str, Tensor], Record]: ...

    def save(self, index: int, block: QuantBlock, module: nn.Module, record: Record) -> None: ...

    def finish(self, sample: Sample, outputs: Tensor) -> None:
        """``outputs`` [1, L, K] is what the last quantized block made of ``sample``."""


Call = tuple[tuple, dict[str, Any]]  # what the model passes to a block beside its input


@dataclass(kw_only=True)
class Prepared:
    """What preparers left of a block: their plan, the block's tensors that they replaced, by name, and the state of its
    random numbers, for what is drawn later."""

    plan: Plan
    tensors: dict[str, Tensor]
    generator: Tensor
    seconds: float


@dataclass(kw_only=True)
class FloatBlock:
    """A block of the float model: its inputs, which may be the very targets of the block before (``follows``), and targets; what
    the model calls it with besides (``calls``, one for each sample, or one for all); its weights where they are at hand, and
    what preparers left where they were here before.

    The streams are good until the next block is asked for.
    """

    index: int
    name: str
    stack: Stack
    calls: Sequence[Call]
    inputs: Activations
    targets: Activations
    follows: bool
    module: nn.Module | None = None
    prepared: Prepared | None = None


Blocks = Generator[FloatBlock, None, None]
Ahead = Callable[[Job, Blocks], Blocks]
Observer = Callable[[str, Tensor, Tensor, Quant], dict[str, Any]]
Progress = Callable[[int, float, float], None]


class Data:
    """One block's data, as methods see it (:class:`microbat.methods.base.BlockData`)."""

    inputs: Activations  # not there while a block is prepared that need not wait for it

    def __init__(self, job: Job, given: FloatBlock, block: nn.Module, progress: Progress):
        self.index, self.block, self.head_dim = given.index, block, job.checkpoint.lanes(given.stack)
        self.rotates, self.float_inputs, self.targets = given.stack.rotates, given.inputs, given.targets
        self.generator = torch.Generator().manual_seed(job.seed * 1_000_003 + given.index)
        self.progress = lambda done, loss: progress(given.index, done, loss)
        self.stack, self.runner = given.stack, Runner(job, given.stack, given.calls, given.inputs.lengths)

    def absmax(self, paths: Iterable[str]) -> dict[str, Tensor]:
        linears = {path: self.block.get_submodule(path) for path in paths}
        largest = {path: torch.zeros(own.in_features, device=own.weight.device) for path, own in linears.items()}

        def add(path: str, x: Tensor) -> None:
            torch.maximum(largest[path], x.flatten(0, -2).abs().amax(0), out=largest[path])

        if largest:
            self.watch({path: partial(add, path) for path in largest})
        return largest

    def watch(self, seen: dict[str, Callable[[Tensor], Any]]) -> None:
        with contextlib.ExitStack() as stack:
            for path, see in seen.items():
                keep = lambda inputs, output, see=see: see(sequences(inputs[0]).to(torch.float32))  # noqa: E731
                stack.enter_context(watch(self.block.get_submodule(path), keep))
            for _ in self.runner.outputs(self.block, self.float_inputs):
                pass

    def faked(
        self, plan: Plan, weights: dict[str, Tensor], *, rounding: Rounding = "fake"
    ) -> Callable[[Tensor, Tensor], Tensor]:
        for site in plan.sites:
            for module in (site.transform, site.activation, *site.weights.values(), plan.kv):
                if isinstance(module, nn.Module):
                    module.to(self.runner.job.device)

        def function(x: Tensor, rows: Tensor) -> Tensor:
            with faked(self.block, plan, weights, rounding) as block:
                return self.runner.step(block, x, rows)

        return function


class Runner:
    """Runs a block: what the model passes to it beside its input, the precision, the batches."""

    def __init__(self, job: Job, stack: Stack, calls: Sequence[Call], lengths: tuple[int, ...]):
        self.job, self.stack, self.calls, self.lengths = job, stack, calls, lengths

    def step(self, block: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
        """What ``block`` makes of samples ``rows``: ``x`` and the result are [R, L, K], or [T, K] where lengths differ."""
        device = self.job.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.job.precision == "bfloat16"):
            if not self.job.pairs:
                return self._call(block, x, self.calls[0])
            lengths = [self.lengths[row] for row in rows.tolist()]
            samples = zip(x.split(lengths), rows.tolist(), strict=True)
            if self.stack.sequences:
                return torch.cat([self._call(block, own[None], self.calls[row])[0] for own, row in samples])
            return torch.cat([self._call(block, own, self.calls[row]) for own, row in samples])

    def _call(self, block: nn.Module, x: Tensor, call: Call) -> Tensor:
        output = block(x, *call[0], **call[1])
        return (output[0] if isinstance(output, tuple) else output).to(torch.float32)

    @torch.no_grad()
    def outputs(self, block: nn.Module, x: Activations) -> Iterator[tuple[Tensor, Tensor]]:
        """What ``block`` makes of ``x``, a few samples at a time, and which they are."""
        for rows in x.batches(self.job.batch):
            yield rows, self.step(block, x[rows], rows)


def sequences(x: Tensor) -> Tensor:
    """[S, L, K], also where tokens are packed [T, K] or go to experts."""
    return x if x.dim() == 3 else x[None]
