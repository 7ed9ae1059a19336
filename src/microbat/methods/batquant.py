"""BATQuant: Outlier-resilient MXFP4 Quantization via Learnable Block-wise Optimization. Li, Zhang, Xia, Bao, Bai,
Dong, Yu, 2026. arXiv 2603.16590.

    (1)  X~ = X P,  W~ = W P^-T,  P = diag(P_1 ... P_k), blocks aligned with the format's
    (2)  P_i = B_i^T (x) A   (GPK; eq. 2 with the convention of Algorithm 1)
    (3)  x_i clipped to [sigma(a_min) min x_i, sigma(a_max) max x_i]  (eq. 3, 4), weights likewise
    (4)  P, a = argmin E || F(X) - F^(X; P, a) ||^2 per transformer block  (eq. 5)

Transforms: one for q, k, v; one for o; one for gate and up; one for down (section 3.2). Experts have the last two once for all
of a block's. Weights are transformed and
clipped offline; activations online. With a quantized cache also P_k, on keys after their position encoding, and P_v on
values, folded into v_proj and o_proj; both act on a head's lanes and are shared by the heads.

Where the paper is silent or fails on a real model, the defaults are what measured best (LOG.md); ``batquant-paper`` is
the recipe as printed. See the fields for each. No code of the authors is public. Algorithm 2 prints the inverse where
only the inverse transpose is exact; that is what is used.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from microbat.formats.block import BlockFormat, QTensor
from microbat.kv import KVQuantizer
from microbat.methods.base import BlockData, ModelData, Plan, Preparer, Rounding, SitePlan, Solver, Student, WholeModel
from microbat.methods.end_to_end import distill
from microbat.methods.learn import (
    IN_ORDER,
    Inputs,
    Objective,
    Schedule,
    check_trains,
    refine_plan,
    start_scales,
    train_plan,
)
from microbat.quantizers.base import AbsMax
from microbat.quantizers.clip import Clip
from microbat.quantizers.residual import Residual, channels_for, common_block
from microbat.scheme import Scheme
from microbat.transforms.balance import balanced_blocks
from microbat.transforms.base import BlockDiagonal, Transform
from microbat.transforms.hadamard import BlockHadamard
from microbat.transforms.kronecker import GPK, FullBlocks, Init, Kronecker, NaiveKronecker, balanced_split
from microbat.transforms.permutation import Ordered, Permutation

Kind = Literal["gpk", "naive_kron", "full", "hadamard", "none", "global"]  # global: FlatQuant's, across the whole width
Scope = Literal["block", "global"]  # whose extremes a clip takes a share of: a block's, or the whole row's or token's


@dataclass(frozen=True, kw_only=True)
class BATQuant(Preparer):
    name: ClassVar[str] = "batquant"
    summary: ClassVar[str] = "learned block-wise affine transforms and clipping"

    transform: Kind = "gpk"
    g: int = 0  # transform block; 0: the format's (section 4.3.2: alignment is best)
    g1: int = 8  # size of the shared matrix, sec. 4.1.2
    # Unstated; the identity barely moves in the paper's 160 steps (sheet C6). "balanced", for full blocks: transforms/balance.py.
    init: Init | Literal["balanced"] = "hadamard"
    lr: float = 5e-3  # the paper's 2e-3 is too small, 1e-2 follows the calibration text too closely, LOG.md
    # Not in the paper: a factor per channel, folded into the norm or into up, so that it costs nothing when the model runs
    # (FlatQuant's). It is learned from max|W|^(1 - a) / max|X|^a on, with this a; 0 for none.
    channel_scale: float = 0.5
    # Not in the paper: this share of an activation's channels, the largest, rounded up to what products take, is quantized twice
    # (ARCQuant's residual channels, quantizers/residual.py). Channels then stand in the order of their size before the transform,
    # and the activation has no clip. init=identity suits it, and soar with error feedback (LOG.md).
    residual: float = 0.0
    clip: bool = True
    clip_lr: float = 2e-2  # unstated; 10 x the paper's rate, as FlatQuant
    # The paper's weights are clipped and rounded to nearest while the transforms train. auto: where the solver repairs what
    # rounding loses, and activations are as coarse as weights, these stay in floats, whatever weight_clip says, which measured
    # better there (LOG.md).
    training_weights: Literal["auto", "rounded"] = "auto"
    weight_clip: bool = True
    clip_scope: Scope = "block"  # global: Table 4's counterpart
    epochs: int = 3
    batch: int = 1  # more steps serve better than larger ones; the paper's is 4
    objective: Objective = "relative"  # the paper's mse fails on massive activations, LOG.md
    inputs: Inputs = (
        "mixed"  # a block sees the size of what the blocks before lost, not its pattern; the paper's are float
    )
    refine_epochs: int = 3  # not in the paper: the online side learns on, against the codes of GPTQ; 0 for not at all
    refine_lr: float = 3e-3
    # Not in the paper: at last the whole model at once against the float model's logits, with the codes of the weights as they
    # are (LOG.md). It needs both models in memory; 0 trains block by block alone.
    distill_epochs: int = 2
    distill_lr: float = 5e-4

    def __post_init__(self) -> None:
        for field in ("lr", "clip_lr", "refine_lr", "distill_lr"):
            if getattr(self, field) < 0:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} must be 0 or more")
        for field, least in (
            ("epochs", 0),
            ("refine_epochs", 0),
            ("distill_epochs", 0),
            ("batch", 1),
            ("g1", 1),
            ("g", 0),
        ):
            if getattr(self, field) < least:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} must be at least {least}")
        if not 0 <= self.channel_scale <= 1:
            raise ValueError(f"{self.name}.channel_scale={self.channel_scale} must be from 0 to 1")
        if not 0 <= self.residual <= 1:
            raise ValueError(f"{self.name}.residual={self.residual} must be from 0 to 1, a share of the channels")
        if self.residual and (self.transform == "global" or self.init == "balanced"):
            raise ValueError(
                f"{self.name}.residual={self.residual} goes with transforms within blocks that start alike, not with "
                f"transform={self.transform}, init={self.init}"
            )
        if self.g and self.transform in ("gpk", "naive_kron") and self.g % self.g1:
            raise ValueError(f"{self.name}.g1={self.g1} does not divide the transform block g={self.g}")

        if self.init == "balanced" and self.transform != "full":
            raise ValueError(
                f"{self.name}.init=balanced has a closed form for transform=full alone, not for {self.transform!r}"
            )

    @property
    def seeded(self) -> bool:
        return self.epochs > 0 or self.init == "orthogonal"

    @property
    def in_order(self) -> str:
        return IN_ORDER.get(self.inputs, "")

    def check(self, scheme: Scheme) -> None:
        if self.epochs or self.weight_clip:
            check_trains(self.name, scheme)
        if self.residual:
            common_block(f"{self.name}.residual", scheme.text, scheme.activation, scheme.weight)

    def check_width(self, width: int, scheme: Scheme) -> None:
        """A format whose scales span a row has blocks as long as the layer is wide, which not every transform can be."""
        block = self.g or scheme.block or width
        if self.transform in ("none", "global"):
            return
        if width % block:
            reason = f"{self.name}.g={self.g} does not divide {width} channels; --set g=0, blocks as long as the format's, does"
        elif self.transform == "hadamard" and block & (block - 1):
            reason = (
                f"blocks of {block} for {self.name}.transform=hadamard are no power of two; --set g={width & -width} is"
            )
        elif self.transform in ("gpk", "naive_kron") and block % self.g1:
            reason = f"{self.name}.g1={self.g1} does not divide the transform block, which is {block}; --set g1=1 does"
        else:
            return
        raise ValueError(f"{reason} (scheme {scheme.text})")

    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        rounding = self._rounding(plan, solver)
        if self.channel_scale and self.epochs and self.init != "balanced":  # which knows its channels' sizes
            start_scales(data, plan, self.channel_scale)
        largest = data.absmax(site.site.consumers[0] for site in plan.sites) if self.residual else {}
        for site in plan.sites:
            linears = {path: data.block.get_submodule(path) for path in site.site.consumers}
            width = next(iter(linears.values())).in_features
            site.transform = self._transform(width, _format(site), data, g=self.g)
            if self.residual:
                self._append(site, largest[site.site.consumers[0]])
            elif self.clip and site.activation is not None:
                site.activation = self._clip(site.activation, width)
            if self.weight_clip and rounding == "fake":
                site.weights = {
                    path: self._clip(q, width, *linears[path].weight.shape[:-1]) for path, q in site.weights.items()
                }
        if plan.kv is not None:
            self._map_values(plan, plan.kv.value.format, data)
            plan.kv = self._cache(plan.kv, data)
        if self.init == "balanced":
            self._balance(data, plan)
        schedule = Schedule(epochs=self.epochs, batch=self.batch, objective=self.objective, inputs=self.inputs)
        train_plan(data, plan, solver, lr=self.lr, clip_lr=self.clip_lr, schedule=schedule, rounding=rounding)
        return plan

    def refine(self, data: BlockData, plan: Plan, codes: dict[str, QTensor], solver: Solver) -> None:
        if (
            self.epochs and solver.weight_lr is None
        ):  # weights that are trained along are trained as they will be rounded
            schedule = Schedule(
                epochs=self.refine_epochs, batch=self.batch, objective=self.objective, inputs=self.inputs
            )
            refine_plan(data, plan, codes, lr=self.refine_lr, clip_lr=self.clip_lr, schedule=schedule)

    @property
    def whole_model(self) -> WholeModel | None:
        why = "distills the whole model at once (distill_epochs=0 trains block by block alone)"
        return WholeModel(why=why, copies=2) if self.distills else None

    @property
    def distills(self) -> bool:
        return self.distill_epochs > 0

    def distill(self, model: ModelData, student: Student) -> list[float]:
        return distill(
            model, student, epochs=self.distill_epochs, batch=self.batch, lr=self.distill_lr, clip_lr=self.clip_lr
        )

    def _rounding(self, plan: Plan, solver: Solver) -> Rounding:
        """Of the weights, while the transforms train."""
        coarse = all(
            site.activation is not None
            and site.activation.format.element.bits <= max(q.format.element.bits for q in site.weights.values())
            for site in plan.sites
        )
        return "none" if self.training_weights == "auto" and solver.repairs and coarse else "fake"

    def _cache(self, kv: KVQuantizer, data: BlockData) -> KVQuantizer:
        """P_k, and a clip for each block of a head's lanes."""
        lanes = data.head_dim
        key, value = kv.key, kv.value
        transform = self._transform(lanes, key.format, data)
        if self.clip:
            key, value = self._clip(key, lanes), self._clip(value, lanes)
        return KVQuantizer(key, value, transform)

    def _clip(self, quantizer: AbsMax, width: int, *rows: int) -> Clip:
        whole = self.clip_scope == "global"
        blocks = 1 if whole else width // quantizer.format.block_of(width)
        return Clip(quantizer, shape=(*rows, blocks), whole=whole)

    def _append(self, site: SitePlan, largest: Tensor) -> None:
        """Residual channels for ``site``, whose channels are as large as ``largest`` [K]."""
        if not isinstance(site.activation, AbsMax):
            return
        order = (largest if site.scale is None else largest * site.scale.detach()).argsort(stable=True)
        width, block = len(order), site.activation.format.block_of(len(order))
        alone = site.transform is None
        site.transform = Permutation(width=width, order=order) if alone else Ordered(map=site.transform, order=order)
        site.activation = Residual(inner=site.activation, channels=channels_for(width, self.residual * width, block))

    def _map_values(self, plan: Plan, format: BlockFormat, data: BlockData) -> None:
        """P_v. What o then receives is transformed by P_v P_o, of which only P_o runs online: it starts as the identity where
        both have blocks of one size. A family closed under products loses nothing by it (sheet: P_v^-1 merged into P_o). None
        where o's channels stand in the order of their size, which it would change.
        """
        site = plan.value_site()
        if site is None or not isinstance(site.transform, BlockDiagonal):
            return
        plan.values = self._transform(data.head_dim, format, data)
        if plan.values.block == site.transform.block:
            site.transform = self._transform(site.transform.width, _format(site), data, g=self.g, init="identity")

    @torch.no_grad()
    def _balance(self, data: BlockData, plan: Plan) -> None:
        """Start full blocks where second moments say, a token's counted as if it had length 1; ``plan.values`` comes before."""
        moments: dict[str, Tensor] = {}

        def gather(path: str, size: int, x: Tensor) -> None:
            x_GTB = nn.functional.normalize(x.flatten(0, -2), dim=-1).unflatten(-1, (-1, size)).transpose(0, 1)
            with torch.autocast(x.device.type, enabled=False):
                moments[path] = moments.get(path, 0) + (x_GTB.mT @ x_GTB).to(torch.float64)

        sites = [(site, site.site.consumers[0], site.transform) for site in plan.sites]
        data.watch({path: partial(gather, path, transform.block) for _, path, transform in sites})
        for site, path, transform in sites:
            size, moment = transform.block, moments[path]
            weights = [data.block.get_submodule(path).weight.flatten(0, -2) for path in site.weights]
            weight = torch.cat(weights).to(torch.float64)
            weight_GNB = weight.unflatten(-1, (-1, size)).transpose(0, 1)
            gram = weight_GNB.mT @ weight_GNB
            if plan.values is not None and site is plan.value_site() and plan.values.block == size:
                heads = moment.shape[0] // plan.values.blocks().shape[0]
                maps = (plan.values.blocks(), plan.values.inverse_blocks())
                before, inverse = (blocks.to(moment).repeat(heads, 1, 1) for blocks in maps)
                moment, gram = before.mT @ moment @ before, inverse @ gram @ inverse.mT
            transform.P.copy_(balanced_blocks(moment, gram))

    def _transform(
        self, width: int, format: BlockFormat, data: BlockData, *, g: int = 0, init: Init | None = None
    ) -> Transform | None:
        block = g or format.block_of(width)
        init = init or ("hadamard" if self.init == "balanced" else self.init)
        if self.transform == "none":
            return None
        if self.transform == "hadamard":
            return None if init == "identity" else BlockHadamard(width=width, block=block)
        if self.transform == "global":
            return Kronecker(width=width, left=balanced_split(width), init=init, generator=data.generator)
        if self.transform == "full":
            return FullBlocks(width=width, block=block, init=init, generator=data.generator)
        kind = GPK if self.transform == "gpk" else NaiveKronecker
        return kind(width=width, block=block, g1=self.g1, init=init, generator=data.generator)


def _format(site: SitePlan) -> BlockFormat:
    """The format whose blocks the site's transform is aligned with."""
    quantizer = site.activation or next(iter(site.weights.values()))
    return quantizer.format


@dataclass(frozen=True, kw_only=True)
class BATQuantPaper(BATQuant):
    """The recipe as printed, section 4.1.2, with the register's choices where it is silent; floor scales, GPTQ.

    Its calibration set is 128 sequences of 2048 tokens.
    """

    name: ClassVar[str] = "batquant-paper"
    summary: ClassVar[str] = "BATQuant with the paper's own hyper-parameters"
    default_scale_rule: ClassVar[str] = "floor"

    transform: Kind = "gpk"
    lr: float = 2e-3
    training_weights: Literal["auto", "rounded"] = "rounded"
    channel_scale: float = 0.0
    epochs: int = 5
    batch: int = 4
    objective: Objective = "mse"
    inputs: Inputs = "float"
    refine_epochs: int = 0
    distill_epochs: int = 0


@dataclass(frozen=True, kw_only=True)
class BlockHadamardAlone(BATQuant):
    """X~ = X (I (x) H), W~ = W (I (x) H), H of the format's block, online, and nothing learned: the transform of MR-GPTQ
    (Egiazarian et al., 2025, arXiv 2509.23202), which composes it with GPTQ. Here any solver does, and keys and values of a
    quantized cache are rotated too.
    """

    name: ClassVar[str] = "block-hadamard"
    summary: ClassVar[str] = "fixed Hadamard rotations of the format's blocks"

    transform: Kind = "hadamard"
    channel_scale: float = 0.0
    clip: bool = False
    weight_clip: bool = False
    epochs: int = 0
    refine_epochs: int = 0
    distill_epochs: int = 0
