"""The engine: walks a model block by block; the only place of calibration that moves tensors between devices.

For each block: load its float weights; compute its float targets; let the preparer train; solve each linear layer in
the order of the data flow, on statistics of the inputs as quantized so far; swap; measure; hand the result to the
keeper; go on. Two streams of activations travel along, the float model's and the quantized model's; of the model itself
one block is in memory. A block that the keeper already has is not calibrated again, only run. Where a method prepares
blocks from the float model alone, others may prepare them ahead (:mod:`microbat.calibrate.workers`).

A model with a vision tower has several stacks of blocks, walked in the order of execution: what the language model gets
from the tower is quantized in one stream and float in the other.
"""

# Shapes: S sequences, L tokens, K width, R some of the sequences.
import contextlib
import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microbat.calibrate.block import prepare, quantize_block
from microbat.calibrate.experts import counted, floor_of
from microbat.calibrate.job import (
    Ahead,
    Blocks,
    Data,
    FloatBlock,
    Job,
    Keeper,
    Observer,
    Prepared,
    Progress,
    Record,
    Runner,
    sequences,
)
from microbat.calibrate.memory import allocate
from microbat.calibrate.outside import rounded, standing
from microbat.calibrate.stream import Activations, Passage, passage
from microbat.experts import ExpertLinear
from microbat.linear import QuantBlock, install
from microbat.methods.base import Method
from microbat.models.base import Stack, linear_layers
from microbat.models.checkpoint import Checkpoint
from microbat.scheme import Scheme


def preflight(checkpoint: Checkpoint, scheme: Scheme, methods: Iterable[Method] = ()) -> None:
    """Raise before any work where a layer does not fit the scheme or one of ``methods``, naming the layer."""
    lanes = checkpoint.head_dim
    if scheme.cache and scheme.cache.format.block and lanes % scheme.cache.format.block:
        raise ValueError(
            f"the cache: a head has {lanes} lanes, not a multiple of {scheme.cache.format.name}'s block of "
            f"{scheme.cache.format.block} (scheme {scheme.text}). Leave it in 16 bits with KV16, or choose a format whose "
            "block divides it."
        )
    model = checkpoint.skeleton()
    for stack, place in checkpoint.blocks:
        block = model.get_submodule(place)
        for path in linear_layers(stack, block):
            name = f"{place}.{path}"
            linear = block.get_submodule(path)
            for quantizer in (scheme.weight, scheme.activation):
                size = quantizer.format.block if quantizer and not scheme.ignores(name) else None
                if size and linear.in_features % size:
                    raise ValueError(
                        f"layer {name!r}: K={linear.in_features} is not a multiple of {quantizer.format.name}'s block "
                        f"of {size} (scheme {scheme.text}). Leave it in float with --ignore '{name}' (or "
                        f"--ignore 're:{path}$' for all of its kind), or choose a format whose block divides it."
                    )
            for method in () if scheme.ignores(name) else methods:
                try:
                    method.check_width(linear.in_features, scheme)
                    if isinstance(linear, ExpertLinear):
                        method.check_experts()
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from error


def calibrate(
    job: Job, keeper: Keeper, observe: Observer, progress: Progress, ahead: Ahead | None = None
) -> Iterator[Record]:
    """Quantize the model of ``job`` block by block; yields each block's record when its result is kept. ``ahead`` has blocks
    prepared before their turn."""
    model = job.checkpoint.skeleton()
    blocks = _float_blocks(job, model)
    with contextlib.closing(blocks if ahead is None else ahead(job, blocks)) as floats:
        yield from _walk(job, model, floats, keeper, observe, progress)


def _walk(
    job: Job, model: nn.Module, floats: Blocks, keeper: Keeper, observe: Observer, progress: Progress
) -> Iterator[Record]:
    """Calibrate the float model's blocks as they come."""
    towers: _Towers = {}
    for stack, own in _stacks(job):
        if _unreached(job, stack):
            for index, name in own:
                yield _carried(job, model, index, name, keeper)
            continue
        with standing(model, rounded(job.checkpoint, job.scheme, job.checkpoint.family.others)):
            through, (quantized,) = _enter(job, model, stack, towers, 1)
        for position, (index, _) in enumerate(own):
            record = _calibrate_block(job, next(floats), model, quantized, keeper, observe, progress)
            through.leave(position, quantized)
            progress(index, 1.0, record.error)
            yield record
    keeper.finish(job.first, sequences(quantized[torch.tensor([0])]))


def _stacks(job: Job) -> Iterator[tuple[Stack, list[tuple[int, str]]]]:
    """Every stack with the numbers and names of its blocks, in the order of execution."""
    for stack in job.checkpoint.family.stacks:
        yield stack, [(i, name) for i, (of, name) in enumerate(job.checkpoint.blocks) if of is stack]


def _unreached(job: Job, stack: Stack) -> bool:
    """Whether no calibration sample runs through ``stack``."""
    return stack in job.checkpoint.family.towers and not job.pairs


def _load(job: Job, model: nn.Module, name: str) -> nn.Module:
    """A block with its float weights; the skeleton ``model`` stays empty."""
    return job.checkpoint.load_into(copy.deepcopy(model.get_submodule(name)), name).to(job.device)


def _float_blocks(job: Job, model: nn.Module) -> Blocks:
    """The float model's blocks in order. Two streams take turns: what a block makes is what the next one gets."""
    towers: _Towers = {}
    for stack, own in _stacks(job):
        if _unreached(job, stack):
            continue
        through, (inputs, targets) = _enter(job, model, stack, towers, 2)
        for position, (index, name) in enumerate(own):
            calls = [passage.calls[position] for passage in through.passages]
            follows = position > 0 and not through.adds(position - 1)
            result = FloatBlock(
                index=index, name=name, stack=stack, calls=calls, inputs=inputs, targets=targets, follows=follows
            )
            result.module = _load(job, model, name)
            for rows, output in Runner(job, stack, calls, inputs.lengths).outputs(result.module, inputs):
                _check_finite(output, f"the outputs of {name}")
                targets.write(rows, output)
            yield result
            result.module = None  # its memory goes before the next one's comes
            through.leave(position, targets)
            inputs, targets = targets, inputs


def _calibrate_block(
    job: Job,
    given: FloatBlock,
    model: nn.Module,
    quantized: Activations,
    keeper: Keeper,
    observe: Observer,
    progress: Progress,
) -> Record:
    """Quantize one block, or take it from the keeper, and replace the stream ``quantized`` by what it makes of it."""
    started = time.perf_counter()
    block = given.module if given.module is not None else _load(job, model, given.name)
    kept = keeper.load(given.index) if keeper.has(given.index) else None
    if kept is None:
        result, record = quantize_block(job, Data(job, given, block, progress), quantized, given, observe)
        install(block, result)
    else:
        result, floats, record = kept
        install(block, result)
        block.load_state_dict({k: t.to(job.device) for k, t in floats.items()}, strict=False, assign=True)
    distances = []
    with counted(block) as expert_tokens:
        for rows, output in Runner(job, given.stack, given.calls, quantized.lengths).outputs(block, quantized):
            _check_finite(output, f"the quantized outputs of {given.name}")
            distances.append(_distance(output, given.targets[rows]).flatten())
            quantized.write(rows, output)
    if kept is None:
        record.error, record.expert_tokens = torch.cat(distances).mean().item(), expert_tokens
        if expert_tokens and job.solver.needs:
            experts = block.get_submodule(job.checkpoint.family.experts)
            record.expert_floor = floor_of(experts, job.min_expert_tokens)
        record.seconds += time.perf_counter() - started
        keeper.save(given.index, result, block, record)
    return record


def prepare_block(job: Job, given: FloatBlock) -> Prepared:
    """Prepare a block by itself, from the float model alone."""
    started = time.perf_counter()
    block = _load(job, job.checkpoint.skeleton(), given.name)
    before = block.state_dict()
    data = Data(job, given, block, lambda index, done, loss: None)
    plan = prepare(job, data, given.name)
    return Prepared(
        plan=plan,
        tensors={key: t for key, t in block.state_dict().items() if before[key].data_ptr() != t.data_ptr()},
        generator=data.generator.get_state(),
        seconds=time.perf_counter() - started,
    )


def _carried(job: Job, model: nn.Module, index: int, name: str, keeper: Keeper) -> Record:
    """A block of a tower that no calibration sample reaches: kept as it is."""
    if keeper.has(index):
        return keeper.load(index)[2]
    block = copy.deepcopy(model.get_submodule(name))
    block.load_state_dict(job.checkpoint.tensors(name), assign=True)
    record = Record(name=name, index=index, error=0.0, seconds=0.0, loss=[], layers=[])
    keeper.save(index, QuantBlock(sites=(), weights={}), block, record)
    return record


_Towers = dict[str, dict[int, Activations]]  # path -> block -> what it gave to others than the next block


@dataclass(frozen=True, kw_only=True)
class _Through:
    """The way of a stream through a stack: what the model does around its blocks, for each sample or once for all, and what
    others read: ``taps``, what the blocks in it gave."""

    job: Job
    passages: list[Passage]
    taps: dict[int, Activations]
    tapped: frozenset[int]

    def adds(self, position: int) -> bool:
        """Whether the model adds something to what a block gave."""
        return bool(self.job.pairs) and any(way.added[position] is not None for way in self.passages)

    def leave(self, position: int, x: Activations) -> None:
        """Turn what a block gave into what the next one gets; keep it as it was for others."""
        if position in self.tapped:
            self.taps[position] = _like(self.job, x)
            self.taps[position].values.copy_(x.values)
        for row, way in enumerate(self.passages if self.adds(position) else ()):
            extra, own = way.added[position], torch.tensor([row])
            if extra is not None:
                x.write(own, x[own] + extra.flatten(0, -2))


def _enter(
    job: Job, model: nn.Module, stack: Stack, towers: _Towers, streams: int
) -> tuple[_Through, list[Activations]]:
    """Run ``model`` up to ``stack`` and around its blocks, on what the ``towers`` before it gave; what the first block gets, and
    room for as much, ``streams`` in all."""
    checkpoint, family = job.checkpoint, job.checkpoint.family
    checkpoint.load_entry(model)
    around = [model.get_submodule(path) for path in (family.embedding, *family.others)]
    for module in (*around, *(model.get_submodule(own.rotary) for own in family.stacks)):
        module.to(job.device)
    if job.pairs:
        passages = _passages(job, model, stack, towers)
        samples = [way.inputs.flatten(0, -2).to(torch.float32) for way in passages]
        lengths = tuple(len(own) for own in samples)
        first = Activations(
            allocate((sum(lengths), samples[0].shape[-1]), job.device, job.scratch), lengths, job.device
        )
        for row, own in enumerate(samples):
            first.write(torch.tensor([row]), own)
    else:
        passages = [passage(model, stack, {"input_ids": job.tokens[:1].to(job.device)}, {})]
        embedding = model.get_submodule(family.embedding)
        shape = (*job.tokens.shape, passages[0].inputs.shape[-1])
        first = Activations(allocate(shape, job.device, job.scratch), (), job.device)
        with torch.no_grad():
            for rows in first.batches(job.batch):
                first.write(rows, embedding(job.tokens[rows].to(job.device)))
    for module in around:
        module.to("meta")
    listed = getattr(checkpoint.config_of(stack), stack.taps) if stack.taps else ()
    last = checkpoint.config_of(stack).num_hidden_layers - 1
    tapped = frozenset({*listed, last} if stack in family.towers else ())
    towers[stack.blocks] = {}
    through = _Through(job=job, passages=passages, taps=towers[stack.blocks], tapped=tapped)
    return through, [first, *(_like(job, first) for _ in range(streams - 1))]


def _like(job: Job, x: Activations) -> Activations:
    """Room for a stream of the shape of ``x``."""
    return Activations(allocate(tuple(x.values.shape), job.device, job.scratch), x.lengths, job.device)


def _passages(job: Job, model: nn.Module, stack: Stack, towers: _Towers) -> list[Passage]:
    """The way of every pair, on what the towers' blocks gave."""
    passages = []
    for row, sample in enumerate(job.pairs):
        own = torch.tensor([row])
        before = {path: {i: x[own] for i, x in given.items()} for path, given in towers.items()}
        there = {name: tensor.to(job.device) for name, tensor in sample.items()}
        passages.append(passage(model, stack, there, before))
    return passages


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Each token's squared distance between the two streams over the float one's energy."""
    error = (output - target).square().sum(-1)
    return error / target.square().sum(-1).clamp(min=1e-12)


def _check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or Inf; the float model overflows on the calibration text at this point")
