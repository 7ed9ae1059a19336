"""Block-Hadamard: a fixed Hadamard rotation of each of the format's blocks, online, and nothing learned.

    X~ = X (I (x) H),  W~ = W (I (x) H),  H of the format's block of lanes

The transform of MR-GPTQ (Egiazarian et al., 2025, arXiv 2509.23202), which composes it with GPTQ. Here any solver does, and keys
and values of a quantized cache are rotated too, as BATQuant transforms them. It needs no training: where activations have 8 bits,
it is hard to beat (README).
"""

from dataclasses import dataclass
from typing import ClassVar

from microbat.methods.batquant import BATQuant, Kind


@dataclass(frozen=True, kw_only=True)
class BATQuantHadamard(BATQuant):
    name: ClassVar[str] = "block-hadamard"
    summary: ClassVar[str] = "fixed Hadamard rotations of the format's blocks"

    transform: Kind = "hadamard"
    channel_scale: float = 0.0
    clip: bool = False
    weight_clip: bool = False
    epochs: int = 0
    refine_epochs: int = 0
    distill_epochs: int = 0
