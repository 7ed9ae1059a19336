"""What the linear layers of one site see while their block is being quantized: of the quantized model and of the float one."""

# Shapes: T tokens, K width.

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from microbat.calibrate.stats import Hessian
from microbat.calibrate.stream import Activations
from microbat.linear import SiteInput
from microbat.methods.base import Corrector, Preparer, SitePlan, Statistics
from microbat.quantizers.residual import effective


class _Seen(Exception):
    """Raised, with what was seen, where a block need not run any further."""


@dataclass(frozen=True, kw_only=True)
class SiteStream:
    """A site's input, batch by batch; ``step`` runs ``block``, whose linear layers are the quantized ones, as far as the site.

    ``originals`` are the float layers by path, ``inputs`` and ``float_inputs`` the block's in both streams, ``attention`` the
    module whose cache may be quantized.
    """

    block: nn.Module
    plan: SitePlan
    site: SiteInput
    originals: dict[str, nn.Module]
    attention: nn.Module
    step: Callable[[nn.Module, Tensor, Tensor], Tensor]
    inputs: Activations
    float_inputs: Activations
    device: torch.device
    batch: int

    @property
    def first(self) -> nn.Module:
        """The float layer of the first of the site's consumers."""
        return self.originals[next(iter(self.plan.weights))]

    def quantized(self) -> Iterator[Tensor]:
        """The quantized stream's, transformed and quantized: K channels, residuals added to theirs."""
        for rows in self.inputs.batches(self.batch):
            output = self._output(rows)
            yield effective(self.site.quantizer, output).to(torch.float32)

    def given(self, see: Callable[..., None]) -> None:
        """Call ``see`` with what the first of the site's quantized layers gets, batch by batch: experts get more than x."""
        layer = self.block.get_submodule(next(iter(self.plan.weights)))
        for rows in self.inputs.batches(self.batch):
            see(*self._reach(layer, self.inputs, rows))

    def teacher(self) -> Iterator[Tensor]:
        """What the float block makes of the same stream."""
        return self._float(self.inputs)

    def float(self) -> Iterator[Tensor]:
        """The float stream's."""
        return self._float(self.float_inputs)

    def _float(self, stream: Activations) -> Iterator[Tensor]:
        for rows in stream.batches(self.batch):
            with self._in_floats():
                x = self._reach(self.first, stream, rows)[0].to(torch.float32)
            yield x if self.plan.transform is None else self.plan.transform(x)

    @contextlib.contextmanager
    def _in_floats(self) -> Iterator[None]:
        """The float layers in their places, nothing of the cache quantized."""
        quantized = {path: self.block.get_submodule(path) for path in self.originals}
        kv, self.attention.kv = self.attention.kv, None
        try:
            for path, module in self.originals.items():
                self.block.set_submodule(path, module)
            yield
        finally:
            self.attention.kv = kv
            for path, module in quantized.items():
                self.block.set_submodule(path, module)

    def _reach(self, module: nn.Module, stream: Activations, rows: Tensor) -> tuple:
        """What ``module`` in the block gets on samples ``rows`` of ``stream``."""

        def stop(_: nn.Module, inputs: tuple) -> None:
            raise _Seen(inputs)

        return self._stopped(module.register_forward_pre_hook(stop), stream, rows)

    def _output(self, rows: Tensor) -> Tensor:
        """What the site makes of its input on samples ``rows`` of the quantized stream."""

        def stop(_: nn.Module, inputs: tuple, output: Tensor) -> None:
            raise _Seen(output)

        return self._stopped(self.site.register_forward_hook(stop), self.inputs, rows)

    def _stopped(self, handle: RemovableHandle, stream: Activations, rows: Tensor) -> Any:
        """What the hook of this ``handle`` raises as seen, the block run no further."""
        try:
            self.step(self.block, stream[rows], rows)
        except _Seen as seen:
            return seen.args[0]
        finally:
            handle.remove()
        raise RuntimeError("the block ran to its end without calling the layer that was waited for")


def statistics(stream: SiteStream, needs: frozenset[str], shift: Tensor | None) -> Statistics | None:
    """What a solver asks of a site's input, ``shift`` [K] added to it."""
    if not needs:
        return None
    corrected = (x if shift is None else x + shift for x in stream.quantized())
    width = stream.first.weight.shape[1]
    hessian = Hessian(width, stream.device)
    if "deviation" not in needs:
        for x in corrected:
            hessian.add(x)
        return Statistics(hessian=hessian.mean)
    deviation = Hessian(width, stream.device)
    for x, exact in zip(corrected, stream.float(), strict=True):
        hessian.add(x)
        deviation.add(x, exact - x)
    return Statistics(hessian=hessian.mean, deviation=deviation.mean)


def correction(stream: SiteStream, preparers: tuple[Preparer, ...]) -> Tensor | None:
    """What the correctors among ``preparers`` add to a site's activation [K], all before it being quantized; None for nothing."""
    site = stream.plan.site
    correctors = [method for method in preparers if isinstance(method, Corrector) and method.corrects(site)]
    if not correctors:
        return None
    deviation = _mean(stream.teacher()) - _mean(stream.quantized())
    return torch.stack([corrector.shift(deviation) for corrector in correctors]).sum(0)


def _mean(batches: Iterator[Tensor]) -> Tensor:
    """Mean over all tokens [K], summed in float64."""
    total, tokens = 0.0, 0
    for x in batches:
        total, tokens = total + x.flatten(0, -2).sum(0, dtype=torch.float64), tokens + x[..., 0].numel()
    return (total / tokens).to(torch.float32)


@contextlib.contextmanager
def watch(module: nn.Module, see: Callable[[tuple, Tensor], Any]) -> Iterator[None]:
    """Call ``see(inputs, output)`` at every call of ``module``."""

    def hook(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        see(inputs, output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
