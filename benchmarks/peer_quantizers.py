"""The peers' quantizers, called as their own documentation does, and a check of what comes out.

Each function takes a float model in memory, calibration tokens and the name of a format, and returns a model that
quantizes its activations as it runs, on weights that lie on the format's grid. A peer is imported where it is used.
"""

# Shapes: S sequences, L tokens, T tokens in a window, K in, N out, B block size.

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

E2M1_MAGNITUDES = 8  # 0, 0.5, 1, 1.5, 2, 3, 4, 6: what a block of a 4-bit float format can hold


def llm_compressor(model: nn.Module, tokenizer: Any, tokens_SL: Tensor, preset: str, *, hadamard: int = 0) -> nn.Module:
    """llm-compressor's GPTQ at its defaults; ``hadamard`` rotates blocks of that many inputs of every layer first."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform import QuIPModifier

    recipe: list[Any] = [GPTQModifier(targets="Linear", scheme=preset, ignore=["lm_head"])]
    if hadamard:
        kind = {"transform_type": "hadamard", "transform_block_size": hadamard}
        recipe.insert(0, QuIPModifier(rotations=["v"], targets="Linear", ignore="lm_head", **kind))
    return oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_dict(
            {"input_ids": tokens_SL.tolist(), "attention_mask": torch.ones_like(tokens_SL).tolist()}
        ),
        recipe=recipe,
        num_calibration_samples=tokens_SL.shape[0],
        max_seq_length=tokens_SL.shape[1],
        shuffle_calibration_samples=False,
    )


def auto_round(
    model: nn.Module,
    tokenizer: Any,
    tokens_SL: Tensor,
    preset: str,
    *,
    iters: int = 200,
    batch: int = 8,
    rceil: bool = False,
) -> nn.Module:
    """AutoRound at its defaults, which are 200 iterations of 8 sequences a block, and scales by the floor rule of OCP.

    ``rceil`` takes its other preset, whose activations' scales let no value saturate.

    It casts the whole model to bfloat16. What it does not quantize gets its float32 values back, so that its numbers
    differ from the others' by its rounding alone; codes times scales lose nothing in MXFP4, 2^-9 in NVFP4.
    """
    from auto_round import AutoRound

    floats = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantizer = AutoRound(
        model,
        tokenizer,
        scheme=f"{preset}_RCEIL" if rceil else preset,
        dataset=[{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens_SL.split(1)],
        nsamples=tokens_SL.shape[0],
        seqlen=tokens_SL.shape[1],
        iters=iters,
        batch_size=batch,
    )
    quantized = quantizer.quantize()[0].float()
    # Layers that it quantized go by other names now: a wrapper's.
    untouched = {name: tensor for name, tensor in floats.items() if name in quantized.state_dict()}
    quantized.load_state_dict(untouched, strict=False)
    return quantized


@dataclass(frozen=True, kw_only=True)
class Peer:
    package: str
    quantize: Callable[..., nn.Module]

    @property
    def version(self) -> str | None:
        """The installed version, None where there is none."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


PEERS = {
    "llm-compressor": Peer(package="llmcompressor", quantize=llm_compressor),
    "AutoRound": Peer(package="auto-round", quantize=auto_round),
}


class Products(TorchFunctionMode):
    """Inside it, counts the products with weights of ``shapes``, and those of them with both operands in 4 bits.

    An operand in 4 bits has no more different magnitudes in a block than E2M1 has; a float one has about ``block``.
    """

    def __init__(self, shapes: set[tuple[int, ...]], block: int):
        super().__init__()
        self.shapes, self.block = shapes, block
        self.all = self.on_grid = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and tuple(args[1].shape) in self.shapes:
            self.all += 1
            self.on_grid += all(self._in_4_bits(operand) for operand in args[:2])
        return func(*args, **(kwargs or {}))

    def _in_4_bits(self, x: Tensor) -> bool:
        sorted_GB = x.detach().abs().unflatten(-1, (-1, self.block)).sort(-1).values
        return bool(((sorted_GB.diff(dim=-1) > 0).sum(-1) < E2M1_MAGNITUDES).all())


@torch.no_grad()
def check_products(model: nn.Module, floats: nn.Module, tokens_T: Tensor, block: int) -> int:
    """The number of linear layers of ``floats`` but its output head, all of which ``model`` multiplies in 4 bits.

    Raises ValueError where it does not: a number measured on such a model would be that of another format.
    """
    head = floats.get_output_embeddings()
    layers = [m for m in floats.modules() if isinstance(m, nn.Linear) and m is not head]
    with Products({tuple(m.weight.shape) for m in layers}, block) as products:
        model(input_ids=tokens_T[None], use_cache=False)
    if not products.on_grid == products.all == len(layers):
        raise ValueError(
            f"{products.on_grid} of {products.all} products have both operands in 4 bits; the model has {len(layers)} layers"
        )
    return len(layers)
