"""The roles that a method plays, and the plain data it leaves behind.

A method is a frozen dataclass whose fields are its hyper-parameters; ``name`` is what users type. A new file with a
new :class:`Preparer` or :class:`Solver` is found because it is there.
"""

# Shapes: S sequences, L tokens each, K in, N out.

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from microbat.formats.block import QTensor
from microbat.formats.composite import Composite
from microbat.formats.scales import sees_tensor
from microbat.kv import KVQuantizer
from microbat.models.base import Site
from microbat.models.checkpoint import Checkpoint
from microbat.models.rotation import Rotation
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip, clipped, rounding
from microbat.quantizers.dual import DualScale
from microbat.quantizers.mixed import Mixed
from microbat.quantizers.residual import Residual
from microbat.scheme import Scheme
from microbat.transforms.base import BlockDiagonal, Transform

Quant = AbsMax | Clip | Mixed | DualScale
# Of a block's weights while it trains. fake: anew at every pass; none: they stay in floats, transformed; done: they are on their
# grid already, in the basis of the transformed activation, and are left alone.
Rounding = Literal["fake", "none", "done"]


@dataclass(kw_only=True)
class SitePlan:
    """What happens to one activation, and with which quantizer each of its consumers' weights is stored. ``scale`` [K]
    multiplies the activation's channels before the transform, until training folds it into what produces them."""

    site: Site
    transform: Transform | None
    activation: Quant | Residual | None
    weights: dict[str, Quant]
    scale: nn.Parameter | None = None


@dataclass(kw_only=True)
class Plan:
    """What a method decided about one block. ``kv`` quantizes the cache of the module at ``attention``; ``values`` maps the
    values within each head, until training folds it into the weights. ``latents`` are weights that were learned along, by
    path: what the solver rounds instead of the float weight (absent: the float weight itself)."""

    sites: list[SitePlan]
    kv: KVQuantizer | None = None
    attention: str = "self_attn"
    values: BlockDiagonal | None = None
    latents: dict[str, Tensor] = field(default_factory=dict)
    loss: list[float] = field(default_factory=list)

    def value_site(self) -> SitePlan | None:
        """The site that reads the values, where every linear layer that makes or reads them is in the plan."""
        planned = {path for site in self.sites for path in site.weights}
        headed = (s for s in self.sites if s.site.headed and {s.site.producer, *s.site.consumers} <= planned)
        return next(headed, None)

    def folded(
        self, weights: dict[str, Tensor], biases: dict[str, Tensor | None]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
        """Weights [N, K] or [E, N, K] and biases [N] of linear layers, by path, around activations that are scaled, values that
        are mapped.

        Both go into the rows that make them, and inverted into the columns that read them.
        """
        weights, biases = dict(weights), dict(biases)
        for plan in (plan for plan in self.sites if plan.scale is not None):
            producer = plan.site.producer
            if producer in weights:
                weights[producer] = weights[producer] * plan.scale[:, None]
            if biases.get(producer) is not None:
                biases[producer] = biases[producer] * plan.scale
            inverse = plan.scale.reciprocal()  # whose gradient is one product with the weight, a quotient's three
            weights |= {path: weights[path] * inverse for path in plan.weights if path in weights}
        if self.values is None:
            return weights, biases
        lanes = self.values.width
        for site in (plan.site for plan in self.sites if plan.site.headed):
            if site.producer in weights:
                weights[site.producer] = _by_head(self.values.forward, weights[site.producer].T, lanes).T
            if biases.get(site.producer) is not None:
                biases[site.producer] = _by_head(self.values.forward, biases[site.producer], lanes)
            for path in (path for path in site.consumers if path in weights):
                weights[path] = _by_head(self.values.inverse_t, weights[path], lanes)
        return weights, biases


def _by_head(transform: Callable[[Tensor], Tensor], x: Tensor, lanes: int) -> Tensor:
    """``transform`` on the lanes of every head of ``x`` [..., heads x lanes]."""
    with torch.autocast(x.device.type, enabled=False):
        return transform(x.unflatten(-1, (-1, lanes))).flatten(-2)


class Stream(Protocol):
    """Activations of S sequences, float32. ``x[rows]``, ``rows`` int64 [R], are those of some: [R, L, K] or, where each has a
    length of its own, all their tokens [T, K]."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class BlockData(Protocol):
    """One block's calibration data, as a method sees it; weights are [N, K], of experts [E, N, K]. ``rotates``: a rotation of the
    whole model reaches its stream. ``inputs`` are what the quantized blocks before it made; there are none while preparers that
    are not ``in_order`` prepare."""

    index: int
    block: nn.Module
    head_dim: int
    rotates: bool
    inputs: Stream
    targets: Stream
    float_inputs: Stream
    generator: torch.Generator
    progress: Callable[[float, float], None]

    def absmax(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """The largest magnitude of each input channel [K] of the linear layers at ``paths``, over the float stream."""

    def watch(self, seen: dict[str, Callable[[Tensor], Any]]) -> None:
        """Run the float block over the float stream once; each function gets the inputs [S, L, K] of the linear layer at its
        path, batch by batch; those of experts, which the router has mixed, as one sequence [1, T, K]."""

    def faked(
        self, plan: Plan, weights: dict[str, Tensor], *, rounding: Rounding = "fake"
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The block as a differentiable function of inputs and the rows that they belong to, which quantizes by ``plan``, with
        ``weights`` in its linear layers, which ``rounding`` says what to do with."""


@dataclass(frozen=True, kw_only=True)
class ModelData:
    """The float model and the calibration ``tokens`` int64 [S, L], or ``pairs`` of images and text, each what the model is called
    with, as a method sees them before the blocks' turn."""

    checkpoint: Checkpoint
    tokens: Tensor
    scheme: Scheme
    seed: int
    device: torch.device
    precision: Literal["float32", "bfloat16"]
    progress: Callable[[float, float], None]
    pairs: tuple[dict[str, Tensor], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Student:
    """The quantized model after all blocks' turn, its linear layers floats on their grids, with what happens online to
    activations and the cache. Its clips learn; of everything else nothing asks for a gradient yet."""

    network: nn.Module
    transforms: list[Transform]
    quantizers: list[Quant | Residual]


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """Why a method needs the whole model in memory, said of the method, and how many ``copies`` of it in float32."""

    why: str
    copies: int = 1


class Method(ABC):
    """Something with a name that users type and typed hyper-parameters."""

    name: ClassVar[str]
    summary: ClassVar[str]
    default_scale_rule: ClassVar[str] = ""  # "": each format's own default

    @property
    def seeded(self) -> bool:
        """Whether the seed decides more than the calibration text: what trains or starts at random differs by seed."""
        return False

    def check(self, scheme: Scheme) -> None:  # noqa: B027
        """Raise ValueError, with what to do instead, where the method has no meaning for ``scheme``; asked before any work."""

    def check_width(self, width: int, scheme: Scheme) -> None:  # noqa: B027
        """Raise ValueError where it has none for a layer of ``width`` inputs; asked for each layer, before any work."""

    def check_experts(self) -> None:  # noqa: B027
        """Raise ValueError where it does nothing sensible to experts [E, N, K]; asked before any work."""


class Preparer(Method):
    """Decides where and how to transform and clip; leaves the float function of the block as it was.

    ``default_solver`` is the last step that suits it best; ``needs`` the kinds of site (``normed``, ``headed``) that a family
    must have for it; ``solvers`` the last steps that know what its quantizers make, empty for all.
    """

    default_solver: ClassVar[str] = "gptq"
    solvers: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def in_order(self) -> str:
        """Why blocks are prepared one after the other, said of the method; empty where ``prepare`` sees the float model alone and
        takes long enough to be shared."""
        return "trains nothing block by block"

    @property
    def whole_model(self) -> "WholeModel | None":
        """What it does with the whole model at once; None where blocks suffice, whatever the size of the model."""
        return None

    def rotation(self, model: ModelData) -> Rotation | None:
        """How to rotate the whole model before its blocks are prepared; None for not at all."""
        return None

    @property
    def distills(self) -> bool:
        """Whether :meth:`distill` does anything."""
        return False

    def distill(self, model: ModelData, student: Student) -> list[float]:
        """Train, in place and with the whole model at once, what the quantized model has in floats; the loss of each step."""
        return []

    @abstractmethod
    def prepare(self, data: BlockData, plan: Plan, solver: "Solver") -> Plan: ...

    def refine(self, data: BlockData, plan: Plan, codes: dict[str, QTensor], solver: "Solver") -> None:
        """Adapt what ``plan`` does to activations to the ``codes`` that the solver gave the weights, by path."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a solver asked for about one site's input X: ``hessian`` = X^T X / T and ``deviation`` = (X' - X)^T X / T [K, K],
    float64, X' the float model's input; None where it was not asked for."""

    hessian: Tensor
    deviation: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Codes of one weight, and what the solver has to say about how it got them. ``order`` [K]: the solver took the input's
    channels in another order, the same for all weights of the site, and so are the codes' columns."""

    weight: QTensor | Composite
    notes: dict[str, float] = field(default_factory=dict)
    order: Tensor | None = None


class Corrector(Preparer):
    """Also repairs what solving left: a constant for each channel of an activation, stored as a bias of its linear layers."""

    @abstractmethod
    def corrects(self, site: Site) -> bool:
        """Whether :meth:`shift` is asked for ``site``."""

    @abstractmethod
    def shift(self, deviation: Tensor) -> Tensor:
        """What to add to a site's activation [K] once all before it is quantized. ``deviation`` [K] is the mean over tokens of
        what the float block makes of the same inputs, less what the quantized one makes."""


class Solver(Method):
    """Picks the codes of one weight. ``needs`` names the statistics of the layer's quantized input that it wants;
    ``weight_lr``, in units of each weight's root mean square, asks a preparer to train the weights along with its own
    parameters. ``takes_stacks``: :meth:`solve` rounds the weights [E, N, K] of experts as they are; others get one after the
    other. ``repairs``: what rounding one column loses, those after it make up for. ``by_row``: each row is rounded by itself, and
    what the Hessian asks for once is worth having once for all weights that read one activation."""

    needs: ClassVar[frozenset[str]] = frozenset()
    weight_lr: ClassVar[float | None] = None
    takes_stacks: ClassVar[bool] = False
    repairs: ClassVar[bool] = False
    by_row: ClassVar[bool] = False

    def check_experts(self) -> None:
        missing = ", ".join(sorted(self.needs - {"hessian"}))
        if not self.takes_stacks and missing:
            raise ValueError(
                f"{self.name} cannot round experts: it needs their {missing}. Choose gptq, or leave them in float with "
                "--ignore 're:experts'"
            )
        if not self.takes_stacks and self.reorders:
            raise ValueError(
                f"{self.name} takes channels in an order of its own, and experts share one activation: leave their order with "
                "--set order=natural"
            )

    @property
    def reorders(self) -> bool:
        """Whether it takes a site's channels in an order of its own (``Solution.order``), which no transform may then precede."""
        return False

    @abstractmethod
    def solve(self, weight: Tensor, quantizer: Quant, statistics: Statistics | None) -> Solution:
        """Codes of ``weight`` [N, K], which is in the basis that the site's transform leaves it in."""

    def solve_site(
        self, weights: dict[str, Tensor], quantizers: dict[str, Quant], statistics: Statistics | None
    ) -> dict[str, Solution]:
        """Codes of all the weights that read one activation, by path.

        In a format with a tensor scale they are one weight of more rows, each clipped as its quantizer says, and so share it:
        engines multiply them at once. So they are for a solver that goes ``by_row``, to save time. Solvers that decide more for
        them together do so here.
        """
        inner = together(quantizers, by_row=self.by_row)
        if inner is None:
            return {path: self.solve(weight, quantizers[path], statistics) for path, weight in weights.items()}
        stack = [clipped(quantizers[path], weight) for path, weight in weights.items()]
        whole = self.solve(torch.cat(stack, dim=-2), inner, statistics)
        assert isinstance(whole.weight, QTensor)
        parts = whole.weight.split_rows([weight.shape[-2] for weight in stack])
        return {
            path: replace(whole, weight=part, notes=dict(whole.notes))
            for path, part in zip(weights, parts, strict=True)
        }


def together(quantizers: dict[str, Quant], *, by_row: bool = False) -> AbsMax | None:
    """What rounds the weights that read one activation as one, their clips aside; None where each is rounded by itself.
    ``by_row``: as one also where no scale sees more than a row."""
    inner = rounding(next(iter(quantizers.values())))
    if len(quantizers) == 1 or not isinstance(inner, AbsMax):
        return None
    row_by_row = by_row and not sees_tensor(inner.format, inner.rule)
    return inner if inner.format.has_tensor_scale or row_by_row else None
