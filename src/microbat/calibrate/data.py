"""Calibration data: token sequences of one length with a fingerprint of what they hold.

``self`` (the default, nothing to download) is text that the float model writes itself, as in the paper: each sequence
starts from a random token (LLM-QAT, arXiv 2305.17888) and is sampled at temperature 1. A path names a text or jsonl
file; anything else is a data set of the hub.
"""

# Shapes: S sequences, L tokens.

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microbat.models.base import Checkpoint
from microbat.registry import unknown

HUB_TEXTS = {
    "wikitext-2-raw": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "numina-math-1.5": ("AI-MO/NuminaMath-1.5", None, "train", "solution"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
}
GENERATION_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """``tokens`` int64 [S, L] and where they came from."""

    tokens: Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()[:16]


def check_source(source: str) -> None:
    """Raise for a source that is neither ``self``, a file, nor a known data set."""
    path = Path(source)
    if source != "self" and not path.is_file() and source not in HUB_TEXTS:
        if path.suffix:
            raise ValueError(f"calibration file {source!r} does not exist")
        raise unknown("calibration source", source, ["self", *HUB_TEXTS, "path/to/file.txt or .jsonl"])


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
    from transformers import AutoModelForCausalLM
    from transformers.generation import StoppingCriteriaList

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16).to(device).eval()
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
