"""QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs. Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh,
Hoefler, Hensman, 2024. arXiv 2404.00456.

    R1  the residual stream, a Hadamard matrix with random signs, folded into every weight that reads or writes it
    R2  each head's values, a Hadamard matrix of the head's size, folded into v and o
        the heads among each other before o, and the whole input of down (R4): online

Differs from the authors' code in: embeddings keep their mean (sheet B4, T8); the head's size is the config's, not hidden
by heads (T9); tied embeddings are untied (T11). Where no Hadamard matrix of a size is known, R1 is a random orthogonal
matrix, and what runs online falls back to blocks of the largest power of two (B4). With microscaling formats rotation is
followed by plain quantization, without the authors' clipping ratio.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from microbat.methods.base import BlockData, ModelData, Plan, Preparer, Solver
from microbat.models.rotation import Rotation
from microbat.transforms.hadamard import Hadamard, hadamard, random_hadamard


@dataclass(frozen=True, kw_only=True)
class QuaRot(Preparer):
    name: ClassVar[str] = "quarot"
    summary: ClassVar[str] = "Hadamard rotations of the whole width, folded into weights or online"
    needs: ClassVar[tuple[str, ...]] = ("normed", "headed")

    @property
    def seeded(self) -> bool:
        return True

    def rotation(self, model: ModelData) -> Rotation:
        generator = torch.Generator().manual_seed(model.seed)
        checkpoint = model.checkpoint
        heads = hadamard(checkpoint.head_dim).expand(checkpoint.num_blocks, -1, -1).contiguous()
        return Rotation(stream=random_hadamard(checkpoint.width, generator), heads=heads)

    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        for site in plan.sites:
            if not (site.site.normed and data.rotates):
                width = data.block.get_submodule(site.site.consumers[0]).in_features
                site.transform = Hadamard(width=width, stride=data.head_dim if site.site.headed else 1)
        if plan.kv is not None:
            plan.kv.transform = Hadamard(width=data.head_dim)
        return plan
