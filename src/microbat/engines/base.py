"""The role of an engine: something that runs a folder, so that its answer can be compared with microbat's own."""

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from microbat.quantizers.base import AbsMax
from microbat.registry import subclasses


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an engine made of a sequence: ``logits`` float32 [L, V] of its last L tokens (or log-probabilities), computed in
    ``dtype``; ``layers``: linear layer -> its inputs and its output: [1, tokens, K] and [1, tokens, N], for experts [tokens, K],
    which rows go to which, and [rows, N]; of an engine that holds a block's experts as one module, that one's. Engines that do
    not show their layers leave it empty."""

    logits: Tensor
    dtype: torch.dtype
    layers: dict[str, tuple[tuple[Any, ...], Tensor]] = field(default_factory=dict)


class Engine(ABC):
    """``name`` is what users type; ``install`` the command that installs it; ``activations`` what its products round 16-bit
    activations to, which the calibrated model then does too (None: nothing); ``roundings`` how many models rounded on their
    own its logits are compared between: 2 where its sums have an order of their own, 1 where they are transformers'."""

    name: ClassVar[str]
    install: ClassVar[str]
    activations: ClassVar[AbsMax | None] = None
    roundings: ClassVar[int] = 1

    @abstractmethod
    def run(self, folder: Path, tokens: Tensor, layers: list[str], images: dict[str, Tensor]) -> Run:
        """The logits of ``tokens`` int64 [L] in ``folder``, an export of microbat or a microbat folder, and what went in
        and out of the linear layers of these full names. ``images``: what the model is called with beside the tokens, by name.

        ImportError where the engine is not installed; ValueError where it does not read such a folder.
        """


@torch.no_grad()
def watched(model: nn.Module, tokens: Tensor, layers: list[str], images: dict[str, Tensor]) -> Run:
    """The run of ``model``, a model of transformers in this process; where it holds experts as one module, that one's."""
    seen: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    there = dict(model.named_modules())
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(name if name in there else name.rpartition(".")[0] for name in layers):
            keep = lambda module, inputs, output, name=name: seen.update({name: (inputs, output)})  # noqa: E731
            stack.enter_context(model.get_submodule(name).register_forward_hook(keep))
        placed = {name: tensor.to(model.device) for name, tensor in images.items()}
        logits = model(tokens[None].to(model.device), **placed).logits[0]
    return Run(logits=logits.to("cpu", torch.float32), dtype=model.dtype, layers=seen)


def text_alone(name: str, images: dict[str, Tensor]) -> None:
    """Raise ValueError where there are ``images``, for an engine that was not tried with any."""
    if images:
        raise ValueError(f"{name} was not tried with images; verify this folder with --engine microbat or transformers")


def engines() -> dict[str, type[Engine]]:
    """Every engine by name."""
    return subclasses("microbat.engines", Engine)
