"""What models read, and which of their predictions count: windows of a text, or questions with their answers."""

# Shapes: T tokens in a window, W windows, L tokens in the text.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Inputs = dict[str, Tensor]  # what a model is called with, by name; input_ids [1, T] among it


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows ``tokens_WT`` that start ``stride`` tokens apart.

    Of a window's T - 1 predictions the last ``fresh(index)`` count, so that no token is counted twice: all of them in
    the first window and wherever windows do not overlap, else those of the ``stride`` tokens that are new.
    """

    tokens_WT: Int[Tensor, "W T"]
    stride: int
    skipped: int = 0  # windows of the text before the first of these

    def __len__(self) -> int:
        return self.tokens_WT.shape[0]

    def __iter__(self) -> Iterator[tuple[Inputs, int]]:
        """What a model is called with for each window, and the number of its last predictions that count."""
        return (({"input_ids": tokens_T[None]}, self.fresh(index)) for index, tokens_T in enumerate(self.tokens_WT))

    @property
    def window(self) -> int:
        """Tokens in a window."""
        return self.tokens_WT.shape[1]

    @property
    def num_predictions(self) -> int:
        """How many predictions count, over all windows."""
        return sum(self.fresh(index) for index in range(len(self)))

    def fresh(self, index: int) -> int:
        """How many predictions of window ``index`` count."""
        return self.window - 1 if index == 0 else min(self.stride, self.window - 1)


class Answers:
    """Questions, say about pictures, each with its answer: the answers' tokens are the predictions that count.

    ``makers`` give what the model is called with and how many of its last tokens are the answer's. Each is called anew
    whenever the answers are gone through, so that no more than one picture is in memory.
    """

    window = stride = None

    def __init__(self, makers: Sequence[Callable[[], tuple[Inputs, int]]], skipped: int = 0):
        self.makers, self.skipped = makers, skipped
        self._fresh: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.makers)

    def __iter__(self) -> Iterator[tuple[Inputs, int]]:
        for index, make in enumerate(self.makers):
            inputs, self._fresh[index] = make()
            yield inputs, self._fresh[index]

    @property
    def num_predictions(self) -> int:
        """How many predictions counted, over all answers, after they were gone through."""
        return sum(self._fresh.values())

    def fresh(self, index: int) -> int:
        """How many predictions of answer ``index`` count, after it was reached."""
        return self._fresh[index]


def windows(
    tokens: Int[Tensor, " L"] | Sequence[int],
    window: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    skip: int = 0,
) -> Windows:
    """The first ``limit`` full windows of a text that was tokenised once, as a whole, after ``skip`` that are left out.

    ``stride`` defaults to ``window``, the standard: windows do not overlap, each predicts its last window - 1 tokens,
    and a rest shorter than a window is left out. ``limit`` None takes all windows; a text may give fewer.
    """
    stride = window if stride is None else stride
    if window < 2:
        raise ValueError(f"window={window} predicts nothing; at least 2 tokens are needed")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} is not between 1 and window={window}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no window; it must be at least 1, or None for all")
    tokens_L = torch.as_tensor(tokens, dtype=torch.long)
    if tokens_L.dim() != 1:
        raise ValueError(f"tokens have shape {list(tokens_L.shape)}; one row of tokens is needed")
    if len(tokens_L) < window:
        raise ValueError(
            f"the text has {len(tokens_L)} tokens, fewer than one window of {window}: "
            "take a longer text or a smaller window"
        )
    tokens_WT = tokens_L.unfold(0, window, stride)
    if not 0 <= skip < len(tokens_WT):
        raise ValueError(f"skip={skip} is not between 0 and the text's {len(tokens_WT)} windows less one")
    return Windows(tokens_WT=tokens_WT[skip:][:limit], stride=stride, skipped=skip)


def tokenize(text: str, tokenizer: Any) -> Int[Tensor, " L"]:
    """Tokens of the whole text by a transformers tokenizer, with the special tokens that it adds by itself.

    Those are a BOS at the very start for Llama's tokenizers, none for SmolLM2's and Qwen's; windows after the first
    never begin with one. This is the convention of published perplexities.
    """
    ids = tokenizer(text, verbose=False).input_ids  # verbose: the text is meant to be longer than the model's context
    return torch.tensor(ids, dtype=torch.long)
