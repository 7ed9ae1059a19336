"""Calibration data: token sequences of one length, or images with questions, and a fingerprint of what they hold.

``self`` (the default, nothing to download) is text that the float model writes itself, as in the paper: each sequence
starts from a random token (LLM-QAT, arXiv 2305.17888) and is sampled at temperature 1. A path names a text or jsonl
file, or a folder of images (:mod:`microbat.calibrate.pairs`); anything else is a data set of the hub.
"""

# Shapes: S sequences, L tokens.

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microbat.calibrate.pairs import HUB_PAIRS, are_pairs
from microbat.calibrate.stream import Sample
from microbat.models.checkpoint import Checkpoint
from microbat.registry import unknown

HUB_TEXTS = {
    "wikitext-2-raw": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "numina-math-1.5": ("AI-MO/NuminaMath-1.5", None, "train", "solution"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
}
GENERATION_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``tokens`` int64 [S, L], or ``pairs`` of images and text, and where they came from; ``skipped`` says of each pair that was
    left out why."""

    source: str
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    pairs: tuple[Sample, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        if not self.pairs:
            return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()[:16]
        state = hashlib.sha256()
        for tensor in (sample[name] for sample in self.pairs for name in sorted(sample)):
            state.update(tensor.contiguous().numpy().tobytes())
        return state.hexdigest()[:16]

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of it, by name: :meth:`of` reads it back."""
        return {f"{row}.{name}": t for row, sample in enumerate(self.pairs) for name, t in sample.items()} or {
            "tokens": self.tokens
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor], source: str, skipped: tuple[str, ...] = ()) -> "Calibration":
        if "tokens" in tensors:
            return cls(tokens=tensors["tokens"], source=source)
        pairs: dict[int, Sample] = {}
        for key, tensor in tensors.items():
            row, _, name = key.partition(".")
            pairs.setdefault(int(row), {})[name] = tensor
        return cls(pairs=tuple(pairs[row] for row in sorted(pairs)), source=source, skipped=skipped)


def check_source(source: str) -> None:
    """Raise for a source that is neither ``self``, a file, a folder, nor a known data set."""
    path = Path(source)
    if source != "self" and not path.is_file() and not are_pairs(source) and source not in HUB_TEXTS:
        if path.suffix:
            raise ValueError(f"calibration file {source!r} does not exist")
        known = ["self", *HUB_TEXTS, *HUB_PAIRS, "path/to/file.txt or .jsonl", "path/to/folder of images"]
        raise unknown("calibration source", source, known)


def from_text(source: str, tokenizer: Any, num_sequences: int, length: int, generator: torch.Generator) -> Calibration:
    """Sequences cut at random, non-overlapping places from a file's or a hub data set's tokens."""
    check_source(source)
    needed = num_sequences * length
    ids = torch.tensor(tokenizer(_read(source, needed), add_special_tokens=False)["input_ids"])
    whole = ids.numel() // length
    if whole < num_sequences:
        raise ValueError(
            f"calibration text {source!r} has {ids.numel()} tokens; {num_sequences} sequences of {length} need {needed}"
        )
    rows = torch.randperm(whole, generator=generator)[:num_sequences]
    return Calibration(tokens=ids[: whole * length].view(whole, length)[rows], source=source)


def from_model(
    checkpoint: Checkpoint,
    num_sequences: int,
    length: int,
    seed: int,
    device: torch.device,
    progress: Callable[[float], None],
) -> Calibration:
    """Sequences that the float model writes itself, from random first tokens, at temperature 1."""
    from transformers.generation import StoppingCriteriaList

    model = checkpoint.pretrained(torch.bfloat16).to(device).eval()
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary, (num_sequences, 1), generator=generator)
    special = model.generation_config.eos_token_id
    suppressed = [] if special is None else [special] if isinstance(special, int) else list(special)

    done = 0

    def tell(generated: Tensor, scores: Tensor, **_: Any) -> Tensor:
        progress((done * length + generated.numel()) / (num_sequences * length))
        return torch.zeros(generated.shape[0], dtype=torch.bool, device=generated.device)  # nobody stops early

    parts = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for rows in first.split(GENERATION_BATCH):
            out = model.generate(
                rows.to(device),
                attention_mask=torch.ones_like(rows).to(device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                suppress_tokens=suppressed or None,
                pad_token_id=suppressed[0] if suppressed else 0,
                stopping_criteria=StoppingCriteriaList([tell]),
            )
            parts.append(out.cpu())
            done += rows.shape[0]
    return Calibration(tokens=torch.cat(parts), source="self")


def _read(source: str, tokens: int) -> str:
    if source in HUB_TEXTS:
        return _read_hub(source, tokens)
    text = Path(source).read_text(encoding="utf-8")
    if source.endswith(".jsonl"):
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    return text


def _read_hub(source: str, tokens: int) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"calibration source {source!r} needs the 'datasets' package: pip install datasets") from error
    name, subset, split, column = HUB_TEXTS[source]
    texts, characters = [], 0
    for row in load_dataset(name, subset, split=split, streaming=True):
        texts.append(row[column])
        characters += len(row[column])
        if characters > 8 * tokens:  # about twice what is needed, at four characters a token
            break
    return "\n\n".join(texts)
