"""BRQ: Block Rotation is All You Need for MXFP4 Quantization. Shao et al., 2025. arXiv 2511.04214.

QuaRot's rotations, each cut into blocks that are the format's own, so that no outlier leaves its block:

    R1  the residual stream, blockdiag(D_i H) with random signs D_i, folded
    R2  each head's values, blockdiag(H), folded into v and o
    R4  the input of down, I (x) H, online

The paper's text is all there is (no code is public), and it leaves open which blocks share a matrix; here signs differ
from block to block of the stream and one matrix serves all layers (sheet B6).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from microbat.methods.base import BlockData, ModelData, Plan, Preparer, Solver
from microbat.models.rotation import Rotation
from microbat.transforms.hadamard import BlockHadamard, hadamard


@dataclass(frozen=True, kw_only=True)
class BRQ(Preparer):
    name: ClassVar[str] = "brq"
    summary: ClassVar[str] = "Hadamard rotations within the format's blocks, folded into weights or online"

    def rotation(self, model: ModelData) -> Rotation:
        checkpoint = model.checkpoint
        generator = torch.Generator().manual_seed(model.seed)
        width = checkpoint.config.hidden_size
        signs = torch.randint(0, 2, (width, 1), generator=generator).to(torch.float32) * 2 - 1
        heads = block_hadamard(checkpoint.head_dim, _block(model, checkpoint.head_dim))
        return Rotation(
            stream=signs * block_hadamard(width, _block(model, width)),
            heads=heads.expand(checkpoint.num_blocks, -1, -1).contiguous(),
        )

    def prepare(self, data: BlockData, plan: Plan, solver: Solver) -> Plan:
        for site in plan.sites:
            if not site.site.normed and not site.site.headed:
                width = data.block.get_submodule(site.site.consumers[0]).in_features
                format = (site.activation or next(iter(site.weights.values()))).format
                site.transform = BlockHadamard(width=width, block=_divisor(width, format.block_of(width)))
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
