"""The figures of a comparison: bars by method and scheme, lines over what an ablation varies, quality against time.

In the manner of Figures 1, 4, 6 and 7 of BATQuant (arXiv:2603.16590). Bars start at the float model's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from microbat.report.figures import COLOURS, SYMBOLS, axis, buttons, layout
from microbat.report.text import duration, escape, fixed

PATTERNS = ("", "/", ".")  # of bars, where there are more methods than colours
FILLS = ("", "-open", "-open-dot")  # of symbols there


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured quantity: its key in the data, its name, its decimals, the value that the float model has, which value is
    the best, how much of the float model's quality a value has ``lost``, and in what that is counted."""

    key: str
    name: str
    decimals: int
    float_value: float
    best: str
    lost: Callable[[float], float]
    unit: str


METRICS = (
    Metric(
        key="ratio",
        name="Perplexity over the float model's",
        decimals=3,
        float_value=1.0,
        best="lowest",
        lost=math.log,
        unit="nats",
    ),
    Metric(
        key="kl",
        name="KL divergence from the float model (nats)",
        decimals=4,
        float_value=0.0,
        best="lowest",
        lost=float,
        unit="nats",
    ),
    Metric(
        key="recovery",
        name="Recovery over the benchmarks (%)",
        decimals=2,
        float_value=100.0,
        best="highest",
        lost=lambda value: 100.0 - value,
        unit="points",
    ),
)


def present(entries: list[dict]) -> list[Metric]:
    """The metrics that any entry has."""
    return [metric for metric in METRICS if any(metric.key in entry for entry in entries)]


def bars(entries: list[dict]) -> dict | None:
    """Quality by method and scheme, with error bars; buttons switch the metric."""
    metrics = present(entries)
    if not metrics:
        return None
    labels, schemes = _ordered(entries, "label"), _ordered(entries, "scheme")
    found = {(entry["label"], entry["scheme"]): entry for entry in entries}
    rows = [[found.get((label, scheme), {}) for scheme in schemes] for label in labels]
    traces = [
        {
            "type": "bar",
            "name": escape(label),
            "x": [escape(scheme) for scheme in schemes],
            "base": metrics[0].float_value,
            "marker": {
                "color": COLOURS[index % len(COLOURS)],
                "pattern": {"shape": PATTERNS[index // len(COLOURS) % len(PATTERNS)]},
            },
            "hovertemplate": f"<b>{escape(label)}</b>, %{{x}}<br>%{{text}}<extra></extra>",
            "textposition": "none",
            **_measured(row, metrics[0], above=metrics[0].float_value),
        }
        for index, (label, row) in enumerate(zip(labels, rows, strict=True))
    ]
    choices = [
        (
            _short(metric),
            "update",
            [
                _columns(
                    [_measured(row, metric, above=metric.float_value) | {"base": metric.float_value} for row in rows]
                ),
                {"yaxis.title.text": metric.name},
            ],
        )
        for metric in metrics
    ]
    return _figure(traces, axis("", type="category"), metrics[0].name, choices, barmode="group", height=500)


def ablation(entries: list[dict]) -> dict | None:
    """Quality over the values of the first varied setting; a line for each scheme and each combination of the others."""
    metrics = present(entries)
    if not metrics:
        return None
    first = next(iter(entries[0]["varied"]))
    lines: dict[str, list[dict]] = {}
    for entry in entries:
        others = [f"{key}={value}" for key, value in entry["varied"].items() if key != first]
        lines.setdefault(", ".join([entry["scheme"], *others]), []).append(entry)
    values = [[escape(entry["varied"][first]) for entry in line] for line in lines.values()]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(name),
            "x": x,
            "line": {"color": COLOURS[index % len(COLOURS)], "width": 2},
            "marker": {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
            "hovertemplate": f"<b>{escape(name)}</b>, {escape(first)} = %{{x}}<br>%{{text}}<extra></extra>",
            **_measured(line, metrics[0]),
        }
        for index, ((name, line), x) in enumerate(zip(lines.items(), values, strict=True))
    ]
    choices = [
        (
            _short(metric),
            "update",
            [_columns([_measured(line, metric) for line in lines.values()]), {"yaxis.title.text": metric.name}],
        )
        for metric in metrics
    ]
    return _figure(traces, axis(escape(first), type="category"), metrics[0].name, choices, height=400)


def cost(entries: list[dict]) -> dict | None:
    """The first metric against the time that a run took; a colour and a fill per method, a symbol per scheme."""
    metrics = present(entries)
    if not metrics:
        return None
    metric, drawn = metrics[0], [entry for entry in entries if metrics[0].key in entry]
    labels, schemes = _ordered(drawn, "label"), _ordered(drawn, "scheme")
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": escape(label),
            "x": [entry["seconds"] / 60 for entry in own],
            "text": [f"{escape(entry['scheme'])}: {duration(entry['seconds'])}" for entry in own],
            "hovertemplate": f"<b>{escape(label)}</b>, %{{text}}, %{{y:.3f}}<extra></extra>",
            "marker": {
                "color": COLOURS[index % len(COLOURS)],
                "symbol": [
                    SYMBOLS[schemes.index(entry["scheme"]) % len(SYMBOLS)] + FILLS[index // len(COLOURS) % len(FILLS)]
                    for entry in own
                ],
                "size": 11,
            },
            **{key: value for key, value in _measured(own, metric).items() if key != "text"},
        }
        for index, label in enumerate(labels)
        if (own := [entry for entry in drawn if entry["label"] == label])
    ]
    return _figure(traces, axis("Minutes", type="log"), metric.name, [], height=420)


def value_text(estimate: dict | None, decimals: int, unit: str = "") -> str:
    """1.124 ± 0.003; a dash for what is missing."""
    estimate = estimate or {}
    error = estimate.get("error")
    return fixed(estimate.get("value"), decimals, unit) + (f" ± {fixed(error, decimals, unit)}" if error else "")


def _measured(entries: list[dict], metric: Metric, above: float = 0.0) -> dict:
    """The y values of one trace with their errors and texts; None where an entry was not measured."""
    found = [entry.get(metric.key) for entry in entries]
    return {
        "y": [None if e is None else e["value"] - above for e in found],
        "text": [value_text(e, metric.decimals) for e in found],
        "error_y": {
            "type": "data",
            "array": [(e or {}).get("error") or 0 for e in found],
            "thickness": 1.2,
            "width": 4,
        },
    }


def _columns(traces: list[dict]) -> dict:
    """What plotly's restyle wants: for each property the list of its values, one per trace."""
    return {key: [trace[key] for trace in traces] for key in traces[0]}


def _figure(traces: list[dict], x: dict, y: str, choices: list, **extra: object) -> dict:
    return {
        "data": traces,
        "layout": layout(
            xaxis=x,
            yaxis=axis(y),
            showlegend=True,
            legend={"orientation": "h", "y": -0.28},
            updatemenus=[buttons(*choices)] if len(choices) > 1 else [],
            **extra,
        ),
    }


def _short(metric: Metric) -> str:
    return metric.name.split(" ")[0]


def _ordered(entries: list[dict], key: str) -> list[str]:
    return list(dict.fromkeys(entry[key] for entry in entries))
