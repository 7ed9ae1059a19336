"""The engine: walks a model block by block; the only place of calibration that moves tensors between devices.

For each block: load its float weights; compute its float targets; let the preparer train; solve each linear layer in
the order of the data flow, on statistics of the inputs as quantized so far; swap; measure; hand the result to the
keeper; go on. Two streams of activations travel along, the float model's and the quantized model's; of the model itself
only one block is in memory. A block that the keeper already has is not calibrated again, only run.
"""

# Shapes: S sequences, L tokens, K width.

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from microbat.calibrate.fake import faked, transformed
from microbat.calibrate.inputs import SiteStream, correction, statistics, watch
from microbat.formats.block import QTensor
from microbat.formats.composite import Composite, format_name
from microbat.kv import KVQuantizer
from microbat.linear import QuantBlock, QuantLinear, QuantSite, SiteInput, install
from microbat.methods.base import Method, Plan, Preparer, Quant, SitePlan, Solver
from microbat.models.base import Checkpoint, linear_layers
from microbat.quantizers.clip import Clip
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import facing
from microbat.scheme import Scheme
from microbat.transforms.permutation import Permutation

Precision = Literal["float32", "bfloat16"]
MEASURED_SEQUENCES = 4  # per-layer errors and activation pictures come from the first few calibration sequences


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to calibrate and how. ``tokens`` is int64 [S, L]; ``batch`` sequences run at once where nothing is trained."""

    checkpoint: Checkpoint
    scheme: Scheme
    preparers: tuple[Preparer, ...]
    solver: Solver
    tokens: Tensor
    seed: int
    precision: Precision
    device: torch.device
    batch: int = 4


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

    def finish(self, tokens: Tensor, outputs: Tensor) -> None:
        """``outputs`` [S, L, K] is what the last quantized block made of ``tokens`` [S, L]."""


Observer = Callable[[str, Tensor, Tensor, Quant], dict[str, Any]]
Progress = Callable[[int, float, float], None]


class _Data:
    """One block's data, as methods see it (:class:`microbat.methods.base.BlockData`)."""

    def __init__(self, job: Job, index: int, block: nn.Module, runner: "_Runner", progress: Progress):
        self.index, self.block, self.head_dim = index, block, job.checkpoint.head_dim
        self.generator = torch.Generator().manual_seed(job.seed * 1_000_003 + index)
        self.progress = lambda done, loss: progress(index, done, loss)
        self._runner = runner
        self.inputs = self.float_inputs = self.targets = torch.empty(0)

    def absmax(self, path: str) -> Tensor:
        linear = self.block.get_submodule(path)
        largest = torch.zeros(linear.in_features, device=linear.weight.device)
        self.watch({path: lambda x: torch.maximum(largest, x.flatten(0, -2).abs().amax(0), out=largest)})
        return largest

    def watch(self, seen: dict[str, Callable[[Tensor], Any]]) -> None:
        with contextlib.ExitStack() as stack:
            for path, see in seen.items():
                keep = lambda inputs, output, see=see: see(inputs[0].to(torch.float32))  # noqa: E731
                stack.enter_context(watch(self.block.get_submodule(path), keep))
            self._runner.run(self.block, self.float_inputs)

    def faked(self, plan: Plan, weights: dict[str, Tensor], *, rounded: bool = False) -> Callable[[Tensor], Tensor]:
        for site in plan.sites:
            for module in (site.transform, site.activation, *site.weights.values(), plan.kv):
                if isinstance(module, nn.Module):
                    module.to(self._runner.job.device)

        def function(x: Tensor) -> Tensor:
            with faked(self.block, plan, weights, rounded) as block:
                return self._runner.step(block, x)

        return function


class _Runner:
    """Runs blocks: the keyword arguments that the model passes to each, the precision, the batches."""

    def __init__(self, job: Job, arguments: dict[str, Any]):
        self.job, self.arguments = job, arguments

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        device = self.job.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.job.precision == "bfloat16"):
            output = block(x, **self.arguments)
        return (output[0] if isinstance(output, tuple) else output).to(torch.float32)

    @torch.no_grad()
    def run(self, block: nn.Module, x_SLK: Tensor) -> Tensor:
        return torch.cat([self.step(block, rows) for rows in x_SLK.split(self.job.batch)])


def preflight(checkpoint: Checkpoint, scheme: Scheme, methods: Iterable[Method] = ()) -> None:
    """Raise before any work where a layer does not fit the scheme or one of ``methods``, naming the layer."""
    family, lanes = checkpoint.family, checkpoint.head_dim
    if scheme.cache and scheme.cache.format.block and lanes % scheme.cache.format.block:
        raise ValueError(
            f"the cache: a head has {lanes} lanes, not a multiple of {scheme.cache.format.name}'s block of "
            f"{scheme.cache.format.block} (scheme {scheme.text}). Leave it in 16 bits with KV16, or choose a format whose "
            "block divides it."
        )
    model = checkpoint.skeleton()
    blocks = model.get_submodule(family.blocks)
    for index, block in enumerate(blocks):
        for path in linear_layers(family):
            name = f"{family.blocks}.{index}.{path}"
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
    blocks = model.get_submodule(family.blocks)
    quantized, arguments = _first_inputs(job, model)
    runner = _Runner(job, arguments)
    original = quantized
    for index in range(len(blocks)):
        started = time.perf_counter()
        name = f"{family.blocks}.{index}"
        block = checkpoint.load_into(blocks[index], name).to(job.device)
        data = _Data(job, index, block, runner, progress)
        data.inputs, data.float_inputs, data.targets = quantized, original, runner.run(block, original)
        _check_finite(data.targets, f"the outputs of {name}")
        kept = keeper.load(index)
        if kept is None:
            block_result, record = _quantize_block(job, data, name, observe)
            install(block, block_result)
            outputs = runner.run(block, quantized)
            record.error = _drift(outputs, data.targets)
            record.seconds = time.perf_counter() - started
            keeper.save(index, block_result, block, record)
        else:
            block_result, floats, record = kept
            install(block, block_result)
            block.load_state_dict({k: t.to(job.device) for k, t in floats.items()}, strict=False, assign=True)
            outputs = runner.run(block, quantized)
        _check_finite(outputs, f"the quantized outputs of {name}")
        quantized, original = outputs, data.targets
        blocks[index] = nn.Identity()  # its memory goes; the keeper has what it needs
        progress(index, 1.0, record.error)
        yield record
    keeper.finish(job.tokens, quantized)


def _quantize_block(job: Job, data: _Data, name: str, observe: Observer) -> tuple[QuantBlock, Record]:
    plan = _initial_plan(job, name)
    for preparer in job.preparers:
        plan = preparer.prepare(data, plan, job.solver)
    weights = {path: data.block.get_submodule(path).weight for site in plan.sites for path in site.weights}
    attention = data.block.get_submodule(plan.attention)
    frozen, attention.kv = _frozen(plan)
    solved = _solve(job, data, frozen, {**weights, **plan.latents})
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
    record = Record(name=name, index=data.index, error=0.0, seconds=0.0, loss=plan.loss, layers=layers)
    record.activations = activations
    quantized = QuantBlock(sites=sites, weights=codes, kv=attention.kv, attention=plan.attention, biases=biases)
    return quantized, record


def _initial_plan(job: Job, name: str) -> Plan:
    family, cache = job.checkpoint.family, job.scheme.cache
    plan = Plan(sites=[], kv=cache and KVQuantizer(cache, cache), attention=family.attention)
    for site in family.sites:
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


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """Codes of a block's linear layers, what the solver said of each, and the biases that correctors gave, by path."""

    codes: dict[str, QTensor | Composite]
    notes: dict[str, dict[str, float]]
    biases: dict[str, Tensor]


@torch.no_grad()
def _solve(job: Job, data: _Data, plans: list[SitePlan], weights: dict[str, Tensor]) -> _Solved:
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
            linear = QuantLinear(site, facing(plan.activation, targets[path]), originals[path].bias)
            block.set_submodule(path, linear)
    try:
        for plan in plans:
            stream = _stream(job, data, plan, inputs[plan.site.name], originals)
            shift = correction(stream, job.preparers) if solved.codes else None
            own = {path: targets[path] for path in plan.weights}
            found = job.solver.solve_site(own, plan.weights, statistics(stream, job.solver.needs, shift))
            order = next(iter(found.values())).order
            if order is not None:
                plan.transform = Permutation(width=len(order), order=order)
                shift = None if shift is None else shift[order]
                site = SiteInput(plan.transform, plan.activation, num_consumers=len(plan.weights))
                for path in plan.weights:
                    targets[path], block.get_submodule(path).site = targets[path][:, order], site
            for path, solution in found.items():
                rounded, notes = solution.weight.dequantize(), dict(solution.notes)
                solved.codes[path], solved.notes[path] = facing(plan.activation, solution.weight), notes
                linear = block.get_submodule(path)
                linear.weight = facing(plan.activation, rounded)
                notes["weight_error"] = _ratio(rounded - targets[path], targets[path])
                if shift is not None:
                    bias = rounded @ shift
                    solved.biases[path] = bias if linear.bias is None else bias + linear.bias
                    linear.bias = nn.Parameter(solved.biases[path], requires_grad=False)
    finally:
        for path, module in originals.items():
            block.set_submodule(path, module)
    return solved


def _stream(job: Job, data: _Data, plan: SitePlan, site: SiteInput, originals: dict[str, nn.Module]) -> SiteStream:
    return SiteStream(
        block=data.block,
        plan=plan,
        site=site,
        originals=originals,
        attention=data.block.get_submodule(job.checkpoint.family.attention),
        step=data._runner.step,
        inputs=data.inputs,
        float_inputs=data.float_inputs,
        batch=job.batch,
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
    seen: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for plan in plans:
            first = data.block.get_submodule(next(iter(plan.weights)))
            keep = lambda inputs, output, key=plan.site.name: seen.setdefault(key, inputs[0])  # noqa: E731
            stack.enter_context(watch(first, keep))
        data._runner.run(data.block, data.inputs[:MEASURED_SEQUENCES])
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
    if data.index == job.checkpoint.num_blocks - 1:
        wanted += list(viewed)[-1:]
    pictures = []
    for layer in dict.fromkeys(wanted):
        plan, quantizer = viewed[layer]
        x = seen[plan.site.name].to(torch.float32)
        mapped = x if plan.transform is None else plan.transform(x)
        pictures.append(observe(layer, x.flatten(0, -2), mapped.flatten(0, -2), quantizer))
    return layers, pictures


def _first_inputs(job: Job, model: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    """The first block's inputs [S, L, K], and the keyword arguments that the model passes to its blocks."""
    family = job.checkpoint.family
    embedding = job.checkpoint.load_into(model.get_submodule(family.embedding), family.embedding).to(job.device)
    model.get_submodule(family.rotary).to(job.device)
    first = model.get_submodule(family.blocks)[0]
    caught: dict[str, Any] = {}

    class Caught(Exception):
        pass

    def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise Caught

    with first.register_forward_pre_hook(catch, with_kwargs=True), contextlib.suppress(Caught), torch.no_grad():
        model(job.tokens[:1].to(job.device), use_cache=False)
    with torch.no_grad():
        inputs = torch.cat([embedding(rows.to(job.device)) for rows in job.tokens.split(job.batch)])
    model.set_submodule(family.embedding, nn.Identity())
    return inputs, caught


def _drift(output: Tensor, target: Tensor) -> float:
    """Mean over tokens of the squared distance between the two streams over the float one's energy."""
    error = (output - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp(min=1e-12)).mean().item()


def _ratio(error: Tensor, reference: Tensor) -> float:
    return (error.square().sum() / reference.square().sum().clamp(min=1e-30)).item()


def _check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or Inf; the float model overflows on the calibration text at this point")
