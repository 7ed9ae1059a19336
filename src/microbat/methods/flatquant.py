"""FlatQuant: Flatness Matters for LLM Quantization. Sun, Liu, Bai, Bao, Zhao, Li, Hu, Yu, Hou, Yuan, Jiang, Liu, Yao,
2024. arXiv 2410.09426.

    (1)  Y = Q(X diag(c) P) Q(W diag(1 / c) P^-T)^T,  P = P_1 (x) P_2 across the whole width, c a factor per channel
    (2)  weights clipped per row, activations per token, at learned shares of their extremes
    (3)  P, c and the shares minimise the squared error of each block's output, inputs from the float model

P splits the width as evenly as it divides; before o into heads and head. With a quantized cache the values have a matrix
of their own, folded into v and o, and the second factor before o starts as the identity; the authors fold that factor
into v whatever the cache, and run only the first online: the same family at less cost. c starts at
max|W|^(1 - a) / max|X|^a with a = 0.3 and is folded into the norm, or into the rows of up, in the end; o has none, nor has
what comes out of a GELU.
Recipe: the authors' code (sheet B7), with their weight decay of 0.01 left out. With power-of-two scales a clip must clamp
the values, since a change of the scale alone means nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from microbat.kv import KVQuantizer
from microbat.methods.base import BlockData, Plan, Preparer, SitePlan, Solver
from microbat.methods.learn import (
    IN_ORDER,
    Inputs,
    Objective,
    Schedule,
    check_trains,
    start_scales,
    train_plan,
)
from microbat.quantizers.clip import Clip
from microbat.scheme import Scheme
from microbat.transforms.kronecker import FullBlocks, Kronecker, balanced_split

SCALE_POWER = 0.3


@dataclass(frozen=True, kw_only=True)
class FlatQuant(Preparer):
    name: ClassVar[str] = "flatquant"
    summary: ClassVar[str] = "learned Kronecker transforms of the whole width, a factor per channel, clipping"

    lr: float = 5e-3
    clip_lr: float = 5e-2
    epochs: int = 15
    batch: int = 4
    objective: Objective = "mse"
    inputs: Inputs = "float"

    def __post_init__(self) -> None:
        for field in ("lr", "clip_lr"):
            if getattr(self, field) < 0:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} must be 0 or more")
        for field, least in (("epochs", 0), ("batch", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} must be at least {least}")

    @property
    def seeded(self) -> bool:
        return True

    @property
    def in_order(self) -> str:
        return IN_ORDER.get(self.inputs, "")

    def check(self, scheme: Scheme) -> None:
        check_trains(self.name, scheme)

    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        start_scales(data, plan, SCALE_POWER)
        for site in plan.sites:
            self._start(data, site)
        if plan.kv is not None:
            lanes = data.head_dim
            key, value = (Clip(q, shape=(1,), whole=True) for q in (plan.kv.key, plan.kv.value))
            square = FullBlocks(width=lanes, block=lanes, init="orthogonal", generator=data.generator)
            plan.kv = KVQuantizer(key, value, square)
            self._map_values(plan, data)
        schedule = Schedule(epochs=self.epochs, batch=self.batch, objective=self.objective, inputs=self.inputs)
        train_plan(data, plan, solver, lr=self.lr, clip_lr=self.clip_lr, schedule=schedule)
        return plan

    def _map_values(self, plan: Plan, data: BlockData) -> None:
        """A matrix for the lanes of the values; that before o starts by mixing heads alone."""
        site = plan.value_site()
        if site is not None:
            lanes = data.head_dim
            plan.values = FullBlocks(width=lanes, block=lanes, init="orthogonal", generator=data.generator)
            with torch.no_grad():
                site.transform.R.copy_(torch.eye(lanes))

    def _start(self, data: BlockData, site: SitePlan) -> None:
        """The untrained transform and clips of one site."""
        width = data.block.get_submodule(site.site.consumers[0]).in_features
        left = width // data.head_dim if site.site.headed else balanced_split(width)
        site.transform = Kronecker(width=width, left=left, generator=data.generator)
        if site.activation is not None:
            site.activation = Clip(site.activation, shape=(1,), whole=True)
        site.weights = {
            path: Clip(q, shape=(*data.block.get_submodule(path).weight.shape[:-1], 1), whole=True)
            for path, q in site.weights.items()
        }
