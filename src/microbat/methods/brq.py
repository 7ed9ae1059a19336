"""BRQ: Block Rotation is All You Need for MXFP4 Quantization. Shao et al., 2025. arXiv 2511.04214.

QuaRot's rotations, each cut into blocks that are the format's own, so that no outlier leaves its block:

    R1  the residual stream, blockdiag(D_i H) with random signs D_i, folded
    R2  each head's values, blockdiag(H), folded into v and o
    R4  the input of down, I (x) H, online

Fixed, or learned as SpinQuant learns its own (``steps``). No code is public and the paper leaves open which blocks share a
matrix; here each block of the stream has its own and all layers share them, as the stream demands (sheet B6).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microbat.methods.base import BlockData, ModelData, Plan, Preparer, Solver, WholeModel
from microbat.methods.end_to_end import learn_rotation
from microbat.models.rotation import Rotation
from microbat.transforms.hadamard import BlockHadamard, hadamard


@dataclass(frozen=True, kw_only=True)
class BRQ(Preparer):
    name: ClassVar[str] = "brq"
    summary: ClassVar[str] = "rotations within the format's blocks, Hadamard or learned, folded into weights or online"
    needs: ClassVar[tuple[str, ...]] = ("normed", "headed")

    steps: int = 0  # 0: fixed; the paper's learned variant, trained like SpinQuant (whose number is 100)
    batch: int = 1
    lr: float = 1.5  # SpinQuant's

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.lr <= 0:
            raise ValueError(f"{self}: steps must be 0 or more, batch at least 1, lr above 0")

    @property
    def seeded(self) -> bool:
        return True

    @property
    def whole_model(self) -> WholeModel | None:
        return WholeModel(why="learns its rotations end to end (steps=0 does not)") if self.steps else None

    def rotation(self, model: ModelData) -> Rotation:
        checkpoint = model.checkpoint
        generator = torch.Generator().manual_seed(model.seed)
        width = checkpoint.width
        signs = torch.randint(0, 2, (width, 1), generator=generator).to(torch.float32) * 2 - 1
        heads = block_hadamard(checkpoint.head_dim, _block(model, checkpoint.head_dim))
        start = Rotation(
            stream=signs * block_hadamard(width, _block(model, width)),
            heads=heads.expand(checkpoint.num_blocks, -1, -1).contiguous(),
        )
        if self.steps == 0:
            return start
        online = lambda width: BlockHadamard(width=width, block=_block(model, width))  # noqa: E731
        return learn_rotation(model, start, online, steps=self.steps, batch=self.batch, lr=self.lr)

    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        for site in plan.sites:
            if not (site.site.normed and data.rotates) and not site.site.headed:
                width = data.block.get_submodule(site.site.consumers[0]).in_features
                format = (site.activation or next(iter(site.weights.values()))).format
                site.transform = BlockHadamard(width=width, block=_divisor(width, format.block_of(width)))
        if plan.kv is not None:
            block = _divisor(data.head_dim, plan.kv.key.format.block_of(data.head_dim))
            plan.kv.transform = BlockHadamard(width=data.head_dim, block=block)
        return plan


def block_hadamard(width: int, block: int) -> Tensor:
    """I (x) H_block [width, width]."""
    return torch.kron(torch.eye(width // block), hadamard(block))


def _block(model: ModelData, width: int) -> int:
    quantizer = model.scheme.activation or model.scheme.weight
    assert quantizer is not None  # a scheme without either is refused before
    return _divisor(width, quantizer.format.block_of(width))


def _divisor(width: int, block: int) -> int:
    """The largest power of two up to ``block`` that divides ``width``."""
    divisor = width & -width
    return min(divisor, block & -block if block & (block - 1) == 0 else 1 << (block.bit_length() - 1))
