"""The engine: walks a model block by block; the only place of calibration that moves tensors between devices.

For each block: load its float weights; compute its float targets; let the preparer train; solve each linear layer in
the order of the data flow, on statistics of the inputs as quantized so far; swap; measure; hand the result to the
keeper; go on. Two streams of activations travel along, the float model's and the quantized model's; of the model itself
only one block is in memory. A block that the keeper already has is not calibrated again, only run.

A model with a vision tower has several stacks of blocks, walked in the order of execution: what the language model gets
from the tower is quantized in one stream and float in the other.
"""

# Shapes: S sequences, L tokens, K width, R some of the sequences.

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from microbat.calibrate.fake import faked, transformed
from microbat.calibrate.stats import Hessian
from microbat.calibrate.stream import Passage, Ragged, Sample, Stream, alike, flat, passage
from microbat.formats.block import QTensor
from microbat.formats.composite import Composite, format_name
from microbat.kv import KVQuantizer
from microbat.linear import QuantBlock, QuantLinear, QuantSite, SiteInput, install
from microbat.methods.base import Method, Plan, Preparer, Quant, SitePlan, Solver, Statistics
from microbat.models.base import Checkpoint, Stack, linear_layers
from microbat.quantizers.clip import Clip
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import Residual, effective, facing
from microbat.scheme import Scheme

Precision = Literal["float32", "bfloat16"]
MEASURED_SEQUENCES = 4  # per-layer errors and activation pictures come from the first few calibration sequences


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to calibrate and how, on ``tokens`` int64 [S, L] or, where there are any, on ``pairs`` of images and text.

    ``batch`` sequences run at once where nothing is trained.
    """

    checkpoint: Checkpoint
    scheme: Scheme
    preparers: tuple[Preparer, ...]
    solver: Solver
    tokens: Tensor
    seed: int
    precision: Precision
    device: torch.device
    batch: int = 4
    pairs: tuple[Sample, ...] = ()

    @property
    def first(self) -> Sample:
        """What the model is called with for the first sample."""
        return self.pairs[0] if self.pairs else {"input_ids": self.tokens[:1]}


@dataclass(kw_only=True)
class Record:
    """What happened to one block, as plain numbers."""

    name: str
    index: int
    error: float
    seconds: float
    loss: list[float]
    layers: list[dict[str, Any]]
    activations: list[dict[str, Any]] = field(default_factory=list)


class Keeper(Protocol):
    """Where finished blocks go, and come back from when a run is resumed, with their float tensors by name."""

    def load(self, index: int) -> tuple[QuantBlock, dict[str, Tensor], Record] | None: ...

    def save(self, index: int, block: QuantBlock, module: nn.Module, record: Record) -> None: ...

    def finish(self, sample: Sample, outputs: Tensor) -> None:
        """``outputs`` [1, L, K] is what the last quantized block made of ``sample``."""


Observer = Callable[[str, Tensor, Tensor, Quant], dict[str, Any]]
Progress = Callable[[int, float, float], None]


class _Data:
    """One block's data, as methods see it (:class:`microbat.methods.base.BlockData`)."""

    def __init__(self, job: Job, stack: Stack, index: int, block: nn.Module, runner: "_Runner", progress: Progress):
        self.index, self.block, self.head_dim = index, block, job.checkpoint.lanes(stack)
        self.rotates = stack.rotates
        self.generator = torch.Generator().manual_seed(job.seed * 1_000_003 + index)
        self.progress = lambda done, loss: progress(index, done, loss)
        self._stack, self._runner = stack, runner
        self.inputs: Stream = torch.empty(0)
        self.float_inputs = self.targets = self.inputs

    def absmax(self, path: str) -> Tensor:
        linear = self.block.get_submodule(path)
        largest = torch.zeros(linear.in_features, device=linear.weight.device)
        self.watch({path: lambda x: torch.maximum(largest, x.flatten(0, -2).abs().amax(0), out=largest)})
        return largest

    def watch(self, seen: dict[str, Callable[[Tensor], Any]]) -> None:
        with contextlib.ExitStack() as stack:
            for path, see in seen.items():
                keep = lambda inputs, output, see=see: see(_sequences(inputs[0]).to(torch.float32))  # noqa: E731
                stack.enter_context(_watch(self.block.get_submodule(path), keep))
            self._runner.run(self.block, self.float_inputs)

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
    """Runs a block: what the model passes to it beside its input (``calls``, one for each sample, or one for all), the
    precision, the batches."""

    def __init__(self, job: Job, stack: Stack, calls: Sequence[tuple[tuple, dict[str, Any]]], lengths: tuple[int, ...]):
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

    def _call(self, block: nn.Module, x: Tensor, call: tuple[tuple, dict[str, Any]]) -> Tensor:
        output = block(x, *call[0], **call[1])
        return (output[0] if isinstance(output, tuple) else output).to(torch.float32)

    @torch.no_grad()
    def run(self, block: nn.Module, x: Stream) -> Stream:
        return alike(x, [self.step(block, x[rows], rows) for rows in self.batches(x)])

    def batches(self, x: Stream) -> Iterable[Tensor]:
        """Numbers of the samples that run at once."""
        return torch.arange(len(x)).split(self.job.batch)


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
        for path in linear_layers(stack):
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


def calibrate(job: Job, keeper: Keeper, observe: Observer, progress: Progress) -> Iterator[Record]:
    """Quantize the model of ``job`` block by block; yields each block's record when its result is kept."""
    checkpoint, family = job.checkpoint, job.checkpoint.family
    model = checkpoint.skeleton()
    towers: _Towers = {}
    quantized: Stream = torch.empty(0)
    for stack in family.stacks:
        own = [(index, name) for index, (of, name) in enumerate(checkpoint.blocks) if of is stack]
        if stack in family.towers and not job.pairs:
            for index, name in own:
                yield _carried(job, model, index, name, keeper)
            continue
        through = _enter(job, model, stack, towers)
        quantized, original = through.quantized, through.original
        taps = {*(getattr(checkpoint.config_of(stack), stack.taps) if stack.taps else ()), len(own) - 1}
        towers[stack.blocks] = {}
        for position, (index, name) in enumerate(own):
            started = time.perf_counter()
            block = checkpoint.load_into(model.get_submodule(name), name).to(job.device)
            runner = through.runner(job, position)
            data = _Data(job, stack, index, block, runner, progress)
            data.inputs, data.float_inputs, data.targets = quantized, original, runner.run(block, original)
            _check_finite(flat(data.targets), f"the outputs of {name}")
            kept = keeper.load(index)
            if kept is None:
                block_result, record = _quantize_block(job, data, name, observe)
                install(block, block_result)
                outputs = runner.run(block, quantized)
                record.error = _drift(flat(outputs), flat(data.targets))
                record.seconds = time.perf_counter() - started
                keeper.save(index, block_result, block, record)
            else:
                block_result, floats, record = kept
                install(block, block_result)
                block.load_state_dict({k: t.to(job.device) for k, t in floats.items()}, strict=False, assign=True)
                outputs = runner.run(block, quantized)
            _check_finite(flat(outputs), f"the quantized outputs of {name}")
            if position in taps:
                towers[stack.blocks][position] = outputs, data.targets
            quantized = through.on(position, outputs, through.added)
            original = through.on(position, data.targets, through.float_added)
            model.set_submodule(name, nn.Identity())  # its memory goes; the keeper has what it needs
            progress(index, 1.0, record.error)
            yield record
    keeper.finish(job.first, _sequences(quantized[torch.tensor([0])]))


def _carried(job: Job, model: nn.Module, index: int, name: str, keeper: Keeper) -> Record:
    """A block of a tower that no calibration sample reaches: kept as it is."""
    kept = keeper.load(index)
    if kept is not None:
        return kept[2]
    block = model.get_submodule(name)
    block.load_state_dict(job.checkpoint.tensors(name), assign=True)
    record = Record(name=name, index=index, error=0.0, seconds=0.0, loss=[], layers=[])
    keeper.save(index, QuantBlock(sites=(), weights={}), block, record)
    model.set_submodule(name, nn.Identity())
    return record


def _quantize_block(job: Job, data: _Data, name: str, observe: Observer) -> tuple[QuantBlock, Record]:
    plan = _initial_plan(job, data._stack, name)
    for preparer in job.preparers:
        plan = preparer.prepare(data, plan, job.solver)
    weights = {path: data.block.get_submodule(path).weight for site in plan.sites for path in site.weights}
    attention = data.block.get_submodule(plan.attention)
    frozen, attention.kv = _frozen(plan)
    codes, notes = _solve(job, data, frozen, {**weights, **plan.latents})
    for preparer in job.preparers:
        preparer.refine(data, plan, codes, job.solver)
    frozen, attention.kv = _frozen(plan)
    layers, activations = _measure(job, data, name, frozen, weights, codes, notes, observe)
    sites = tuple(
        QuantSite(name=p.site.name, consumers=tuple(p.weights), transform=p.transform, quantizer=p.activation)
        for p in frozen
    )
    record = Record(name=name, index=data.index, error=0.0, seconds=0.0, loss=plan.loss, layers=layers)
    record.activations = activations
    return QuantBlock(sites=sites, weights=codes, kv=attention.kv, attention=plan.attention), record


def _initial_plan(job: Job, stack: Stack, name: str) -> Plan:
    cache = job.scheme.cache if stack.caches else None
    plan = Plan(sites=[], kv=cache and KVQuantizer(cache, cache), attention=stack.attention)
    for site in stack.sites:
        kept = [path for path in site.consumers if not job.scheme.ignores(f"{name}.{path}")]
        if kept and job.scheme.weight is not None:
            plan.sites.append(
                SitePlan(
                    site=site,
                    transform=None,
                    activation=job.scheme.activation,
                    weights=dict.fromkeys(kept, job.scheme.weight),
                )
            )
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


@torch.no_grad()
def _solve(
    job: Job, data: _Data, plans: list[SitePlan], weights: dict[str, Tensor]
) -> tuple[dict[str, QTensor | Composite], dict[str, dict[str, float]]]:
    """Codes of every linear layer, in the order of the data flow: later sites see earlier ones quantized."""
    codes, notes = {}, {}
    block = data.block
    originals = {path: block.get_submodule(path) for plan in plans for path in plan.weights}
    targets: dict[str, Tensor] = {}
    inputs: dict[str, SiteInput] = {}
    for plan in plans:
        site = SiteInput(plan.transform, plan.activation, num_consumers=len(plan.weights))
        inputs[plan.site.name] = site
        for path in plan.weights:
            targets[path] = transformed(weights[path].to(torch.float64), plan.transform).to(torch.float32)
            linear = QuantLinear(site, facing(plan.activation, targets[path]), originals[path].bias)
            block.set_submodule(path, linear)
    try:
        for plan in plans:
            statistics = None
            if "hessian" in job.solver.needs:
                statistics = Statistics(hessian=_hessian(data, inputs[plan.site.name], next(iter(plan.weights))))
            own = {path: targets[path] for path in plan.weights}
            for path, solution in job.solver.solve_site(own, plan.weights, statistics).items():
                rounded, notes[path] = solution.weight.dequantize(), dict(solution.notes)
                codes[path] = facing(plan.activation, solution.weight)
                block.get_submodule(path).weight = facing(plan.activation, rounded)
                notes[path]["weight_error"] = _ratio(rounded - targets[path], targets[path])
    finally:
        for path, module in originals.items():
            block.set_submodule(path, module)
    return codes, notes


class _Seen(Exception):
    """Raised where a block need not run any further."""


def _hessian(data: _Data, site: SiteInput, path: str) -> Tensor:
    """X^T X / T of a site's quantized activation over the quantized stream; the block runs as far as the site."""
    residual = site.quantizer.channels if isinstance(site.quantizer, Residual) else 0
    hessian = Hessian(data.block.get_submodule(path).weight.shape[1] - residual, data._runner.job.device)

    def see(inputs: tuple, output: Tensor) -> None:
        hessian.add(effective(site.quantizer, output))
        raise _Seen

    with _watch(site, see):
        for rows in data._runner.batches(data.inputs):
            with contextlib.suppress(_Seen):
                data._runner.step(data.block, data.inputs[rows], rows)
    return hessian.mean


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
    seen: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for plan in plans:
            first = data.block.get_submodule(next(iter(plan.weights)))
            keep = lambda inputs, output, key=plan.site.name: seen.setdefault(key, inputs[0])  # noqa: E731
            stack.enter_context(_watch(first, keep))
        rows = torch.arange(min(MEASURED_SEQUENCES, len(data.inputs)))
        with torch.no_grad():
            data._runner.step(data.block, data.inputs[rows], rows)
    layers: list[dict[str, Any]] = []
    viewed: dict[str, tuple[SitePlan, Quant]] = {}
    for plan in plans:
        x = seen[plan.site.name].to(torch.float32)
        mapped = x if plan.transform is None else plan.transform(x)
        rounded = mapped if plan.activation is None else plan.activation.fake(mapped)
        for path in plan.weights:
            exact = x @ weights[path].T
            error = _ratio(rounded @ codes[path].dequantize().T - exact, exact)
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
        x = seen[plan.site.name].to(torch.float32)
        mapped = x if plan.transform is None else plan.transform(x)
        pictures.append(observe(layer, x.flatten(0, -2), mapped.flatten(0, -2), quantizer))
    return layers, pictures


_Towers = dict[str, dict[int, tuple[Stream, Stream]]]  # path -> block -> its outputs, quantized and float


@dataclass(frozen=True, kw_only=True)
class _Through:
    """The way through a stack: what its first block gets, quantized and float; what the model passes to its blocks; what it
    adds between them, block by block, None for nothing."""

    stack: Stack
    quantized: Stream
    original: Stream
    passages: list[Passage]
    added: list[Stream | None]
    float_added: list[Stream | None]

    def runner(self, job: Job, position: int) -> _Runner:
        lengths = self.quantized.lengths if isinstance(self.quantized, Ragged) else ()
        return _Runner(job, self.stack, [passage.calls[position] for passage in self.passages], lengths)

    def on(self, position: int, outputs: Stream, added: list[Stream | None]) -> Stream:
        """What the next block gets."""
        extra = added[position]
        return outputs if extra is None else alike(outputs, [flat(outputs) + flat(extra)])


def _enter(job: Job, model: nn.Module, stack: Stack, towers: _Towers) -> _Through:
    """Run ``model`` up to ``stack`` and around its blocks, on what the ``towers`` before it gave."""
    checkpoint, family = job.checkpoint, job.checkpoint.family
    checkpoint.load_entry(model)
    around = [model.get_submodule(path) for path in (family.embedding, *family.others)]
    for module in (*around, *(model.get_submodule(own.rotary) for own in family.stacks)):
        module.to(job.device)
    if job.pairs:
        ways = [_passages(job, model, stack, towers, version) for version in ((0, 1) if towers else (0,))]
        streams = [_stream([way.inputs for way in passages]) for passages in ways]
        added = [[_added(passages, i) for i in range(len(passages[0].added))] for passages in ways]
    else:
        ways = [[passage(model, stack, {"input_ids": job.tokens[:1].to(job.device)}, {})]]
        embedding = model.get_submodule(family.embedding)
        with torch.no_grad():
            streams = [torch.cat([embedding(rows.to(job.device)) for rows in job.tokens.split(job.batch)])]
        added = [[None] * len(ways[0][0].added)]
    for module in around:
        module.to("meta")
    return _Through(
        stack=stack,
        quantized=streams[0],
        original=streams[-1],
        passages=ways[0],
        added=added[0],
        float_added=added[-1],
    )


def _passages(job: Job, model: nn.Module, stack: Stack, towers: _Towers, version: Literal[0, 1]) -> list[Passage]:
    """The way of every pair, on what the towers' quantized (0) or float (1) blocks gave."""
    passages = []
    for row, sample in enumerate(job.pairs):
        own = torch.tensor([row])
        before = {path: {i: both[version][own] for i, both in given.items()} for path, given in towers.items()}
        there = {name: tensor.to(job.device) for name, tensor in sample.items()}
        passages.append(passage(model, stack, there, before))
    return passages


def _stream(samples: list[Tensor]) -> Ragged:
    tokens = [sample.flatten(0, -2).to(torch.float32) for sample in samples]
    return Ragged(torch.cat(tokens), tuple(len(own) for own in tokens))


def _added(passages: list[Passage], position: int) -> Ragged | None:
    own = [way.added[position] for way in passages]
    if all(extra is None for extra in own):
        return None
    zeros = (torch.zeros_like(way.inputs) for way in passages)
    return _stream([zero if extra is None else extra for zero, extra in zip(zeros, own, strict=True)])


@contextlib.contextmanager
def _watch(module: nn.Module, see: Callable[[tuple, Tensor], Any]) -> Iterator[None]:
    """Call ``see(inputs, output)`` at every call of ``module``."""

    def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        see(inputs, output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _sequences(x: Tensor) -> Tensor:
    """[S, L, K], also where tokens are packed [T, K]."""
    return x if x.dim() == 3 else x[None]


def _drift(output: Tensor, target: Tensor) -> float:
    """Mean over tokens of the squared distance between the two streams over the float one's energy."""
    error = (output - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp(min=1e-12)).mean().item()


def _ratio(error: Tensor, reference: Tensor) -> float:
    return (error.square().sum() / reference.square().sum().clamp(min=1e-30)).item()


def _check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or Inf; the float model overflows on the calibration text at this point")
