"""How the report writes strings and numbers. Whatever is missing or not finite reads as a dash."""

from __future__ import annotations

import html
import math
from typing import Any

DASH = "–"


def escape(value: Any) -> str:
    """Text that is safe in HTML, in attributes too; plotly decodes the same entities in its labels."""
    return html.escape(DASH if value is None else str(value), quote=True)


def is_number(value: Any) -> bool:
    """True for a finite int or float (a bool is not a number here)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 4) -> str:
    """A number with the given significant digits, and thousands separated: 0.01235, 22.55, 16,368."""
    if not is_number(value):
        return DASH
    if isinstance(value, int) or (abs(value) >= 10 ** (digits - 1) and abs(value) < 1e15):
        return f"{value:,.0f}"
    if value and abs(value) < 1e-4:
        return f"{value:.{max(digits - 2, 0)}e}"
    text = f"{value:#.{digits}g}" if value else "0"
    return text.rstrip(".")


def fixed(value: Any, decimals: int, unit: str = "") -> str:
    """A number with the given decimals, and its unit: 1.38×, 81.2%."""
    return f"{value:,.{decimals}f}{unit}" if is_number(value) else DASH


def percent(share: Any, decimals: int = 1) -> str:
    """0.812 as 81.2%."""
    return fixed(100 * share, decimals, "%") if is_number(share) else DASH


def extent(evaluation: dict[str, Any]) -> str:
    """How much was read: 16 windows of 1,024 tokens, stride 1,024, after the first 24; or 1,400 answers."""
    phrase = "{} answers" if evaluation["window"] is None else "{} windows of {} tokens, stride {}"
    read = phrase.format(*(number(evaluation.get(key)) for key in ("windows", "window", "stride")))
    return f"{read}, after the first {number(skipped)}" if (skipped := evaluation.get("skipped")) else read


def size(num_bytes: Any) -> str:
    """Bytes in binary units: 72.3 MiB."""
    if not is_number(num_bytes):
        return DASH
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: Any) -> str:
    """Seconds as a person says them: 12.3 s, 10 min 0 s, 2 h 5 min."""
    if not is_number(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def remarks(score: dict) -> str:
    """What else must be known of a sampled benchmark's score: answers that nobody could judge, or that were cut off."""
    found = [f"{score[kind]} {kind}" for kind in ("unparsed", "truncated") if score.get(kind)]
    return f" ({', '.join(found)} of {score['n'] * score['samples']})" if found else ""
