"""One block on its own: prepared, its weights solved in the order of the data flow, measured, put together."""

# Shapes: L tokens, K width.

import contextlib
import dataclasses
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from microbat.calibrate.experts import expert_hessians, floor_of, solve_experts
from microbat.calibrate.fake import transformed
from microbat.calibrate.inputs import SiteStream, correction, statistics, watch
from microbat.calibrate.job import (
    Data,
    FloatBlock,
    Job,
    Observer,
    Record,
)
from microbat.calibrate.stream import Activations
from microbat.experts import linear
from microbat.formats.block import QTensor
from microbat.formats.composite import Composite, format_name
from microbat.kv import KVQuantizer
from microbat.linear import QuantBlock, QuantLinear, QuantSite, SiteInput
from microbat.methods.base import Plan, Quant, SitePlan, Solution
from microbat.models.base import Stack
from microbat.quantizers.clip import Clip
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import effective, facing
from microbat.transforms.permutation import Permutation

MEASURED_SEQUENCES = 4  # per-layer errors and activation pictures come from the first few calibration sequences


def prepare(job: Job, data: Data, name: str) -> Plan:
    """What the preparers of ``job`` decide about the block ``name``."""
    plan = _initial_plan(job, data.stack, name, data.block)
    for preparer in job.preparers:
        plan = preparer.prepare(data, plan, job.solver)
    return plan


def quantize_block(
    job: Job, data: Data, quantized: Activations, given: FloatBlock, observe: Observer
) -> tuple[QuantBlock, Record]:
    """The block ``given``, whose stream so far is ``quantized``, and what happened to it; nothing is installed yet."""
    name = given.name
    if given.prepared is not None:
        plan = given.prepared.plan
        data.block.load_state_dict(given.prepared.tensors, strict=False, assign=True)
        data.generator.set_state(given.prepared.generator)
        data.inputs = quantized
    elif any(preparer.in_order for preparer in job.preparers):
        data.inputs = quantized
        plan = prepare(job, data, name)
    else:  # what could be prepared elsewhere sees here what it would see there
        plan = prepare(job, data, name)
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
    result = QuantBlock(sites=sites, weights=codes, kv=attention.kv, attention=plan.attention, biases=biases)
    return result, record


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
def _solve(job: Job, data: Data, name: str, plans: list[SitePlan], weights: dict[str, Tensor]) -> _Solved:
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
            stream = _stream(job, data, plan, inputs[plan.site.name], originals)
            if next(iter(own.values())).dim() == 3:
                shift, found = None, _solve_experts(job, stream, name, own)
            else:
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


def _solve_experts(job: Job, stream: SiteStream, name: str, weights: dict[str, Tensor]) -> dict[str, Solution]:
    """Codes of the experts' ``weights`` that read one activation, each expert's on the statistics of its own tokens."""
    path, site = job.checkpoint.family.experts, stream.site
    module = stream.block.get_submodule(path)
    hessians = partial(
        expert_hessians,
        module,
        stream.given,
        lambda x: effective(site.quantizer, site(x)),
        next(iter(weights.values())).shape[-1],
        floor=floor_of(module, job.min_expert_tokens),
        name=f"{name}.{path}",
    )
    return solve_experts(job.solver, weights, stream.plan.weights, hessians)


def _stream(job: Job, data: Data, plan: SitePlan, site: SiteInput, originals: dict[str, nn.Module]) -> SiteStream:
    return SiteStream(
        block=data.block,
        plan=plan,
        site=site,
        originals=originals,
        attention=data.block.get_submodule(data.stack.attention),
        step=data.runner.step,
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
    data: Data,
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
            data.runner.step(data.block, data.inputs[rows], rows)
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


def _ratio(error: Tensor, reference: Tensor) -> float:
    return (error.square().sum() / reference.square().sum().clamp(min=1e-30)).item()
