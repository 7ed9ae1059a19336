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
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from microbat.calibrate.experts import counted, expert_hessians, floor_of, solve_experts
from microbat.calibrate.fake import faked, transformed
from microbat.calibrate.inputs import SiteStream, correction, statistics, watch
from microbat.calibrate.memory import allocate
from microbat.calibrate.stream import Activations, Passage, Sample, passage
from microbat.experts import linear
from microbat.formats.block import QTensor
from microbat.formats.composite import Composite, format_name
from microbat.kv import KVQuantizer
from microbat.linear import QuantBlock, QuantLinear, QuantSite, SiteInput, install
from microbat.methods.base import Method, Plan, Preparer, Quant, SitePlan, Solution, Solver
from microbat.models.base import Checkpoint, Stack, linear_layers
from microbat.quantizers.clip import Clip
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import effective, facing
from microbat.scheme import Scheme
from microbat.transforms.permutation import Permutation

Precision = Literal["float32", "bfloat16"]
MEASURED_SEQUENCES = 4  # per-layer errors and activation pictures come from the first few calibration sequences


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


class _Data:
    """One block's data, as methods see it (:class:`microbat.methods.base.BlockData`)."""

    inputs: Activations  # not there while a block is prepared that need not wait for it

    def __init__(self, job: Job, given: FloatBlock, block: nn.Module, progress: Progress):
        self.index, self.block, self.head_dim = given.index, block, job.checkpoint.lanes(given.stack)
        self.rotates, self.float_inputs, self.targets = given.stack.rotates, given.inputs, given.targets
        self.generator = torch.Generator().manual_seed(job.seed * 1_000_003 + given.index)
        self.progress = lambda done, loss: progress(given.index, done, loss)
        self._stack, self._runner = given.stack, _Runner(job, given.stack, given.calls, given.inputs.lengths)

    def absmax(self, path: str) -> Tensor:
        linear = self.block.get_submodule(path)
        largest = torch.zeros(linear.in_features, device=linear.weight.device)
        self.watch({path: lambda x: torch.maximum(largest, x.flatten(0, -2).abs().amax(0), out=largest)})
        return largest

    def watch(self, seen: dict[str, Callable[[Tensor], Any]]) -> None:
        with contextlib.ExitStack() as stack:
            for path, see in seen.items():
                keep = lambda inputs, output, see=see: see(_sequences(inputs[0]).to(torch.float32))  # noqa: E731
                stack.enter_context(watch(self.block.get_submodule(path), keep))
            for _ in self._runner.outputs(self.block, self.float_inputs):
                pass

    def faked(
        self, plan: Plan, weights: dict[str, Tensor], *, rounded: bool = False
    ) -> Callable[[Tensor, Tensor], Tensor]:
        for site in plan.sites:
            for module in (site.transform, site.activation, *site.weights.values(), plan.kv):
                if isinstance(module, nn.Module):
                    module.to(self._runner.job.device)

        def function(x: Tensor, rows: Tensor) -> Tensor:
            with faked(self.block, plan, weights, rounded) as block:
                return self._runner.step(block, x, rows)

        return function


class _Runner:
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
        through, (quantized,) = _enter(job, model, stack, towers, 1)
        for position, (index, _) in enumerate(own):
            record = _calibrate_block(job, next(floats), model, quantized, keeper, observe, progress)
            through.leave(position, quantized)
            progress(index, 1.0, record.error)
            yield record
    keeper.finish(job.first, _sequences(quantized[torch.tensor([0])]))


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
            for rows, output in _Runner(job, stack, calls, inputs.lengths).outputs(result.module, inputs):
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
        result, record = _quantize_block(job, _Data(job, given, block, progress), quantized, given, observe)
        install(block, result)
    else:
        result, floats, record = kept
        install(block, result)
        block.load_state_dict({k: t.to(job.device) for k, t in floats.items()}, strict=False, assign=True)
    distances = []
    with counted(block) as expert_tokens:
        for rows, output in _Runner(job, given.stack, given.calls, quantized.lengths).outputs(block, quantized):
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
    data = _Data(job, given, block, lambda index, done, loss: None)
    plan = _prepare(job, data, given.name)
    return Prepared(
        plan=plan,
        tensors={key: t for key, t in block.state_dict().items() if before[key].data_ptr() != t.data_ptr()},
        generator=data.generator.get_state(),
        seconds=time.perf_counter() - started,
    )


def _prepare(job: Job, data: _Data, name: str) -> Plan:
    plan = _initial_plan(job, data._stack, name, data.block)
    for preparer in job.preparers:
        plan = preparer.prepare(data, plan, job.solver)
    return plan


def _carried(job: Job, model: nn.Module, index: int, name: str, keeper: Keeper) -> Record:
    """A block of a tower that no calibration sample reaches: kept as it is."""
    if keeper.has(index):
        return keeper.load(index)[2]
    block = copy.deepcopy(model.get_submodule(name))
    block.load_state_dict(job.checkpoint.tensors(name), assign=True)
    record = Record(name=name, index=index, error=0.0, seconds=0.0, loss=[], layers=[])
    keeper.save(index, QuantBlock(sites=(), weights={}), block, record)
    return record


def _quantize_block(
    job: Job, data: _Data, quantized: Activations, given: FloatBlock, observe: Observer
) -> tuple[QuantBlock, Record]:
    name = given.name
    if given.prepared is not None:
        plan = given.prepared.plan
        data.block.load_state_dict(given.prepared.tensors, strict=False, assign=True)
        data.generator.set_state(given.prepared.generator)
        data.inputs = quantized
    elif any(preparer.in_order for preparer in job.preparers):
        data.inputs = quantized
        plan = _prepare(job, data, name)
    else:  # what could be prepared elsewhere sees here what it would see there
        plan = _prepare(job, data, name)
        data.inputs = quantized
    weights = {path: data.block.get_submodule(path).weight for site in plan.sites for path in site.weights}
    attention = data.block.get_submodule(plan.attention)
    frozen, attention.kv = _frozen(plan)
    solved = _solve(job, data, name, frozen, {**weights, **plan.latents})
    for site, done in zip(plan.sites, frozen, strict=True):
        site.transform = done.transform  # the solver may have ordered the channels
    codes = solved.codes
    for preparer in job.preparers:
        preparer.refine(data, plan, codes, job.solver)
    frozen, attention.kv = _frozen(plan)
    layers, activations = _measure(job, data, name, frozen, weights, codes, solved.notes, observe)
    codes, biases = _folded(data.block, frozen, solved)
    sites = tuple(
        QuantSite(name=p.site.name, consumers=tuple(p.weights), transform=p.transform, quantizer=p.activation)
        for p in frozen
    )
    seconds = given.prepared.seconds if given.prepared else 0.0
    record = Record(name=name, index=data.index, error=0.0, seconds=seconds, loss=plan.loss, layers=layers)
    record.activations = activations
    quantized = QuantBlock(sites=sites, weights=codes, kv=attention.kv, attention=plan.attention, biases=biases)
    return quantized, record


def _initial_plan(job: Job, stack: Stack, name: str, block: nn.Module) -> Plan:
    cache, quantizer = job.scheme.cache if stack.caches else None, job.scheme.weight
    plan = Plan(sites=[], kv=cache and KVQuantizer(cache, cache), attention=stack.attention)
    for site in stack.sites_in(block):
        kept = [path for path in site.consumers if not job.scheme.ignores(f"{name}.{path}")]
        if kept and quantizer is not None:
            stacks = {path: block.get_submodule(path).weight.dim() == 3 for path in kept}
            weights: dict[str, Quant] = {path: replace(quantizer, stacked=stack) for path, stack in stacks.items()}
            plan.sites.append(SitePlan(site=site, transform=None, activation=job.scheme.activation, weights=weights))
    return plan


def _fixed(quantizer: Quant) -> Quant:
    return quantizer.freeze() if isinstance(quantizer, Clip) else quantizer


def _frozen(plan: Plan) -> tuple[list[SitePlan], KVQuantizer | None]:
    """Every site, and the cache, with what was learned so far as constants; the plan's own clips go on learning."""
    return [_freeze(site) for site in plan.sites], _freeze_kv(plan.kv)


def _freeze_kv(kv: KVQuantizer | None) -> KVQuantizer | None:
    if kv is None:
        return None
    transform = None if kv.transform is None else kv.transform.requires_grad_(False)
    return KVQuantizer(_fixed(kv.key), _fixed(kv.value), transform)


def _freeze(site: SitePlan) -> SitePlan:
    transform = None if site.transform is None else site.transform.requires_grad_(False)
    weights = {path: _fixed(quantizer) for path, quantizer in site.weights.items()}
    activation = None if site.activation is None else _fixed(site.activation)
    return SitePlan(site=site.site, transform=transform, activation=activation, weights=weights)


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """Codes of a block's linear layers, what the solver said of each, and the biases that correctors gave, by path."""

    codes: dict[str, QTensor | Composite]
    notes: dict[str, dict[str, float]]
    biases: dict[str, Tensor]


@torch.no_grad()
def _solve(job: Job, data: _Data, name: str, plans: list[SitePlan], weights: dict[str, Tensor]) -> _Solved:
    """Codes of every linear layer, in the order of the data flow: later sites see earlier ones quantized and corrected.

    Where the solver takes a site's channels in an order of its own, that becomes the site's transform in ``plans``.
    """
    solved = _Solved(codes={}, notes={}, biases={})
    block = data.block
    originals = {path: block.get_submodule(path) for plan in plans for path in plan.weights}
    targets: dict[str, Tensor] = {}
    inputs: dict[str, SiteInput] = {}
    for plan in plans:
        site = SiteInput(plan.transform, plan.activation, num_consumers=len(plan.weights))
        inputs[plan.site.name] = site
        for path in plan.weights:
            targets[path] = transformed(weights[path].to(torch.float64), plan.transform).to(torch.float32)
            layer = QuantLinear(site, facing(plan.activation, targets[path]), originals[path].bias)
            block.set_submodule(path, layer)
    try:
        for plan in plans:
            own = {path: targets.pop(path) for path in plan.weights}
            if next(iter(own.values())).dim() == 3:
                shift, found = None, _solve_experts(job, data, name, plan, inputs[plan.site.name], own)
            else:
                stream = _stream(job, data, plan, inputs[plan.site.name], originals)
                shift = correction(stream, job.preparers) if solved.codes else None
                found = job.solver.solve_site(own, plan.weights, statistics(stream, job.solver.needs, shift))
            order = next(iter(found.values())).order
            if order is not None:
                plan.transform = Permutation(width=len(order), order=order)
                shift = None if shift is None else shift[order]
                site = SiteInput(plan.transform, plan.activation, num_consumers=len(plan.weights))
                for path in plan.weights:
                    own[path], block.get_submodule(path).site = own[path][:, order], site
            for path, solution in found.items():
                rounded, notes = solution.weight.dequantize(), dict(solution.notes)
                solved.codes[path], solved.notes[path] = facing(plan.activation, solution.weight), notes
                layer = block.get_submodule(path)
                layer.weight = facing(plan.activation, rounded)
                notes["weight_error"] = _ratio(rounded - own[path], own[path])
                if shift is not None:
                    bias = rounded @ shift
                    solved.biases[path] = bias if layer.bias is None else bias + layer.bias
                    layer.bias = nn.Parameter(solved.biases[path], requires_grad=False)
    finally:
        for path, module in originals.items():
            block.set_submodule(path, module)
    return solved


def _solve_experts(
    job: Job, data: _Data, name: str, plan: SitePlan, site: SiteInput, weights: dict[str, Tensor]
) -> dict[str, Solution]:
    """Codes of the experts' ``weights`` that read one activation, each expert's on the statistics of its own tokens."""
    path, (first, weight) = job.checkpoint.family.experts, next(iter(weights.items()))
    module = data.block.get_submodule(path)
    hessians = partial(
        expert_hessians,
        module,
        partial(_run_until, data, first),
        lambda x: effective(site.quantizer, site(x)),
        weight.shape[-1],
        floor=floor_of(module, job.min_expert_tokens),
        name=f"{name}.{path}",
    )
    return solve_experts(job.solver, weights, plan.weights, hessians)


class _Seen(Exception):
    """Raised where a block need not run any further."""


def _run_until(data: _Data, path: str, see: Callable[..., None]) -> None:
    """Run the block over the quantized stream as far as the layer at ``path``; ``see`` gets what each batch gives the layer."""

    def stop(_: nn.Module, inputs: tuple) -> None:
        see(*inputs)
        raise _Seen

    job = data._runner.job
    handle = data.block.get_submodule(path).register_forward_pre_hook(stop)
    try:
        for rows in data.inputs.batches(1 if job.pairs else job.batch):  # samples of their own lengths run one by one
            with contextlib.suppress(_Seen):
                data._runner.step(data.block, data.inputs[rows], rows)
    finally:
        handle.remove()


def _stream(job: Job, data: _Data, plan: SitePlan, site: SiteInput, originals: dict[str, nn.Module]) -> SiteStream:
    return SiteStream(
        block=data.block,
        plan=plan,
        site=site,
        originals=originals,
        attention=data.block.get_submodule(data._stack.attention),
        step=data._runner.step,
        inputs=data.inputs,
        float_inputs=data.float_inputs,
        device=job.device,
        # A block that stops has seen one sample of those that go one by one.
        batch=1 if data.inputs.lengths else job.batch,
    )


def _folded(
    block: nn.Module, plans: list[SitePlan], solved: _Solved
) -> tuple[dict[str, QTensor | Composite], dict[str, Tensor]]:
    """Codes and biases with the columns' factors of weights in the rows of what produces their activation, whose codes stay."""
    codes, biases = dict(solved.codes), dict(solved.biases)
    for plan in plans:
        for path in plan.weights:
            q, producer = codes[path], plan.site.producer
            if not isinstance(q, QTensor) or q.columns is None:
                continue
            module, made = block.get_submodule(producer), codes.get(producer)
            if isinstance(made, QTensor):
                codes[producer] = made.with_rows(q.columns)
            else:
                module.weight = nn.Parameter(module.weight * q.columns[:, None], requires_grad=False)
            bias = biases.get(producer, module.bias)
            if producer in biases:
                biases[producer] = biases[producer] * q.columns
            elif bias is not None:
                module.bias = nn.Parameter(bias * q.columns, requires_grad=False)
            codes[path] = dataclasses.replace(q, columns=None)
    return codes, biases


def _measure(
    job: Job,
    data: _Data,
    name: str,
    plans: list[SitePlan],
    weights: dict[str, Tensor],
    codes: dict[str, Any],
    notes: dict[str, dict[str, float]],
    observe: Observer,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Each layer's errors on a few sequences of the quantized stream, and pictures of activations: the worst layer's,
    and in the last block its last site's as well, which is there whatever the method, so that runs can be compared."""
    seen: dict[str, tuple] = {}
    with contextlib.ExitStack() as stack:
        for plan in plans:
            first = data.block.get_submodule(next(iter(plan.weights)))
            keep = lambda inputs, output, key=plan.site.name: seen.setdefault(key, inputs)  # noqa: E731
            stack.enter_context(watch(first, keep))
        rows = torch.arange(min(MEASURED_SEQUENCES, len(data.inputs)))
        with torch.no_grad():
            data._runner.step(data.block, data.inputs[rows], rows)
    layers: list[dict[str, Any]] = []
    viewed: dict[str, tuple[SitePlan, Quant]] = {}
    for plan in plans:
        x, *routed = seen[plan.site.name]
        x = x.to(torch.float32)
        mapped = x if plan.transform is None else plan.transform(x)
        rounded = mapped if plan.activation is None else plan.activation.fake(mapped)
        for path in plan.weights:
            exact = linear(x, weights[path], None, *routed)
            error = _ratio(linear(rounded, codes[path].dequantize(), None, *routed) - exact, exact)
            q, shape, transform = codes[path], weights[path].shape, plan.transform
            layers.append(
                {
                    "name": f"{name}.{path}",
                    "block": data.index,
                    "site": plan.site.name,
                    "kind": path.rsplit(".", 1)[-1],
                    "shape": list(shape),
                    "format": format_name(q),
                    "bits": 8 * q.nbytes / shape.numel(),
                    "residual_channels": q.shape[-1] - shape[-1],
                    "transform": None if transform is None else transform.name,
                    "transform_params": 0 if transform is None else transform.num_parameters,
                    "output_error": error,
                    **notes[path],
                }
            )
            if plan.activation is not None and not isinstance(plan.activation, Mixed):
                viewed[f"{name}.{path}"] = plan, plan.activation
    errors = {layer["name"]: layer["output_error"] for layer in layers}
    wanted = [max(viewed, key=errors.__getitem__)] if viewed else []
    if data.index == len(job.checkpoint.blocks) - 1:
        wanted += list(viewed)[-1:]
    pictures = []
    for layer in dict.fromkeys(wanted):
        plan, quantizer = viewed[layer]
        x = seen[plan.site.name][0].to(torch.float32)
        mapped = x if plan.transform is None else plan.transform(x)
        pictures.append(observe(layer, x.flatten(0, -2), mapped.flatten(0, -2), quantizer))
    return layers, pictures


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


def _sequences(x: Tensor) -> Tensor:
    """[S, L, K], also where tokens are packed [T, K] or go to experts."""
    return x if x.dim() == 3 else x[None]


def _distance(output: Tensor, target: Tensor) -> Tensor:
    """Each token's squared distance between the two streams over the float one's energy."""
    error = (output - target).square().sum(-1)
    return error / target.square().sum(-1).clamp(min=1e-12)


def _ratio(error: Tensor, reference: Tensor) -> float:
    return (error.square().sum() / reference.square().sum().clamp(min=1e-30)).item()


def _check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or Inf; the float model overflows on the calibration text at this point")
