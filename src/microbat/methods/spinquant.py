"""SpinQuant: LLM Quantization with Learned Rotations. Liu, Zhao, Fedorov, Soran, Choudhary, Krishnamoorthi, Chandra,
Tian, Blankevoort, 2024. arXiv 2405.16406.

QuaRot's rotations R1 (residual stream) and R2 (each block's values), learned end to end; R4 (input of down) stays a fixed
Hadamard matrix and online. The loss is the next token's cross-entropy of the model with quantized activations and float
weights (what the authors do where GPTQ follows). Cayley SGD keeps the matrices orthogonal:

    W = A - A^T,  A = V X - X^T (X V X) / 2,  V = -grad^T;   X <- solution of Y = X^T + a W (X^T + Y) / 2, transposed

with a = min(lr, 1 / |W|_1) and five fixed-point steps (sheet B5). Differs from the authors' code in: no cross-head online
step is needed before o, as in their paper; the calibration text is the run's own, in ``steps`` batches of ``batch``
sequences, the same for all methods; embeddings keep their mean (T8), the head's size is the config's (T9).

A float model in memory with its activations for one batch is needed: no block-by-block way exists for this loss.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from microbat.methods.base import BlockData, ModelData, Plan, Preparer, Solver, WholeModel
from microbat.methods.end_to_end import learn_rotation
from microbat.models.rotation import Rotation
from microbat.transforms.hadamard import Hadamard, random_hadamard


@dataclass(frozen=True, kw_only=True)
class SpinQuant(Preparer):
    name: ClassVar[str] = "spinquant"
    summary: ClassVar[str] = "rotations of the whole width, learned end to end"
    needs: ClassVar[tuple[str, ...]] = ("normed", "headed")

    steps: int = 100  # the authors' number, of 8 sequences of 2048
    batch: int = 1
    lr: float = 1.5  # the authors'

    def __post_init__(self) -> None:
        for field in ("steps", "batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{self.name}.{field}={getattr(self, field)} must be at least 1")
        if self.lr <= 0:
            raise ValueError(f"{self.name}.lr={self.lr} must be above 0")

    @property
    def seeded(self) -> bool:
        return True

    @property
    def whole_model(self) -> WholeModel:
        return WholeModel(why="learns its rotations end to end (quarot, and brq with steps=0, do not)")

    def rotation(self, model: ModelData) -> Rotation:
        generator = torch.Generator().manual_seed(model.seed)
        checkpoint = model.checkpoint
        stream = random_hadamard(checkpoint.width, generator)
        heads = torch.stack([random_hadamard(checkpoint.head_dim, generator) for _ in range(checkpoint.num_blocks)])
        start = Rotation(stream=stream, heads=heads)
        return learn_rotation(
            model, start, lambda width: Hadamard(width=width), steps=self.steps, batch=self.batch, lr=self.lr
        )

    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        for site in plan.sites:
            if not (site.site.normed and data.rotates) and not site.site.headed:
                width = data.block.get_submodule(site.site.consumers[0]).in_features
                site.transform = Hadamard(width=width)
        if plan.kv is not None:
            plan.kv.transform = Hadamard(width=data.head_dim)
        return plan
