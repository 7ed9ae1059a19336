"""What the JSON of a microbat folder may say: ``quantization_config`` in config.json, and what each shard says of itself.

Whatever is written there decides what the model computes, so a key that this version does not know is refused: a newer one
wrote it, and to pass over it would be to compute something else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUANT_METHOD = "microbat"
# 1: readers passed over keys that they did not know; what it holds is read as 2 is.
SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)
CONVENTION = {
    "transform": "x @ P and W @ P^-T, blocks of P: B^T (x) A",
    "order": "transform, clip, scale, round",
    "rounding": "nearest, ties to even",
}

# Key -> the keys of what is below it, of each entry where that is a list; ``ANY``: names of the model's own.
ANY = "*"
_ROLE: dict[str, Any] = {"format": {}, "scale_rule": {}, "rounding": {}}
_CONTRACT = {
    **dict.fromkeys(("quant_method", "schema", "scheme", "ignore", *CONVENTION), {}),
    **dict.fromkeys(("weights", "activations", "kv_cache"), _ROLE),
}
_QUANTIZER: dict[str, Any] = {
    "format": {},
    "scale_rule": {},
    "clips_whole": {},
    "residual_channels": {},
    "parts": {"format": {}, "scale_rule": {}, "width": {}},
}
_TRANSFORM: dict[str, Any] = {ANY: {}, "map": {ANY: {}}}  # its class knows its settings
_SHARD = {
    "name": {},
    "sites": {
        "name": {},
        "consumers": {},
        "transform": _TRANSFORM,
        "activation": _QUANTIZER,
        "weights": {ANY: {"format": {}, "shape": {}, "parts": {}}},
    },
    "experts": {ANY: {}},
    "biases": {},
    "kv": {"attention": {}, "key": _QUANTIZER, "value": _QUANTIZER, "transform": _TRANSFORM},
    "sha256": {ANY: {}},
}


def check_contract(contract: dict[str, Any], file: str | Path) -> None:
    """Raise ValueError where ``contract``, the ``quantization_config`` of ``file``, is not one that this version computes."""
    if contract.get("schema") not in READABLE:
        raise ValueError(
            f"{file} has schema {contract.get('schema')!r}; this version of microbat reads "
            f"{' and '.join(map(str, READABLE))}: pip install --upgrade microbat"
        )
    _check_keys(contract, _CONTRACT, file)
    for key, value in CONVENTION.items():
        if contract.get(key) != value:
            raise ValueError(
                f"{file} was written under another convention: {key} is {contract.get(key)!r}, not {value!r}"
            )


def check_description(description: dict[str, Any], shard: Path) -> None:
    """Raise ValueError where ``description``, what ``shard`` says of itself, says something that this version does not know."""
    _check_keys(description, _SHARD, f"shard {shard}")


def _check_keys(entry: dict[str, Any], known: Mapping[str, Any], file: str | Path, above: str = "") -> None:
    for key, value in entry.items():
        below = known.get(key, known.get(ANY))
        if below is None:
            here = ", ".join(above + own for own in known) or "nothing"
            raise ValueError(
                f"{file} says {above + key!r}; this version of microbat knows {here} there: it was made by a newer microbat, "
                "pip install --upgrade microbat"
            )
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _check_keys(part, below, file, f"{above}{key}.")
