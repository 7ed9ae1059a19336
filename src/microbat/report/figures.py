"""The figures about errors and training, as plain plotly figures ({"data": ..., "layout": ...}).

Pure functions of the report's data: plotly itself is not needed to build them. A figure that would be empty is None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from microbat.report.text import escape, is_number, number

COLOURS = ["#3366a8", "#d1603d", "#3a8f6b", "#8b5fb0", "#c79a22", "#c4527f", "#4fa3b8", "#6b7280"]
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"]
BEFORE, AFTER = "#d1603d", "#3366a8"
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "#22303c"}
GRID_COLOUR = "#e6e9ed"
MAP_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 4, 10)  # shares of the loss
MAX_STEPS = 240  # points drawn of one training curve; longer ones are averaged over equal bins


def layout(**extra: Any) -> dict:
    """The layout that all figures share, updated with `extra`."""
    shared = {
        "font": FONT,
        "margin": {"l": 64, "r": 16, "t": 48, "b": 52},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "height": 440,
    }
    return shared | extra


def axis(title: str, **extra: Any) -> dict:
    """An axis with its title and a quiet grid."""
    return {"title": {"text": title}, "gridcolor": GRID_COLOUR, "zeroline": False, "automargin": True} | extra


def buttons(*choices: tuple[str, str, list], x: float = 1.0) -> dict:
    """A row of buttons above the plot; a choice is (label, plotly method, its arguments)."""
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": [{"label": label, "method": method, "args": args} for label, method, args in choices],
        "x": x,
        "xanchor": "right",
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": 8},
        "showactive": True,
        "bgcolor": "#f4f6f8",
        "bordercolor": "#d5dae0",
    }


def layer_errors(layers: list[dict]) -> dict | None:
    """Relative error per kind of layer over the block index, on a log axis; buttons switch output and weight error.

    Where a block has several layers of one kind (experts), the worst of them is drawn.
    """
    kinds: dict[str, dict[int, dict]] = {}
    for layer in layers:
        if is_number(layer.get("block")):
            at_kind = kinds.setdefault(str(layer.get("kind")), {})
            rival = at_kind.get(layer["block"])
            if rival is None or (_positive(layer.get("output_error")) or 0) > (
                _positive(rival.get("output_error")) or 0
            ):
                at_kind[layer["block"]] = layer
    measures = {"Output error": "output_error", "Weight error": "weight_error"}
    drawn = {
        label: [[_positive(worst[block].get(key)) for block in sorted(worst)] for worst in kinds.values()]
        for label, key in measures.items()
    }
    present = [label for label, rows in drawn.items() if any(y is not None for row in rows for y in row)]
    if not present:
        return None
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(kind),
            "x": sorted(worst),
            "y": drawn[present[0]][index],
            "text": [_layer_hover(worst[block]) for block in sorted(worst)],
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": COLOURS[index % len(COLOURS)], "width": 1.6},
            "marker": {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 6},
        }
        for index, (kind, worst) in enumerate(kinds.items())
    ]
    choices = [
        (label, "update", [{"y": drawn[label]}, {"yaxis.title.text": f"Relative {label.lower()}"}]) for label in present
    ]
    return {
        "data": traces,
        "layout": layout(
            xaxis=axis("Block index"),
            yaxis=_log_axis(f"Relative {present[0].lower()}", *(row for label in present for row in drawn[label])),
            showlegend=True,
            legend={"orientation": "h", "y": -0.24},
            height=480,
            updatemenus=[buttons(*choices)] if len(choices) > 1 else [],
        ),
    }


def block_errors(blocks: list[dict]) -> dict | None:
    """Relative error of each block's output, and in the hover the seconds it took."""
    rows = [block for block in blocks if _positive(block.get("error")) is not None]
    if not rows:
        return None
    hover = [
        f"<b>{escape(row.get('name'))}</b><br>error {number(row['error'])}<br>{number(row.get('seconds'), 3)} s"
        for row in rows
    ]
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [row.get("index") for row in rows],
        "y": [row["error"] for row in rows],
        "text": hover,
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": AFTER, "width": 2},
        "marker": {"size": 7},
    }
    return {
        "data": [trace],
        "layout": layout(
            xaxis=axis("Block index"),
            yaxis=_log_axis("Relative block error", trace["y"]),
            height=320,
            margin={"l": 64, "r": 16, "t": 16, "b": 52},
        ),
    }


def training_curves(blocks: list[dict]) -> dict | None:
    """Loss per step, one line per block, coloured by depth; buttons switch the share of the start and the loss."""
    curves = [(block, *_binned(block.get("loss") or [])) for block in blocks]
    curves = [curve for curve in curves if any(_positive(y) is not None for y in curve[2])]
    if not curves:
        return None
    relative = [_relative(losses) for _, _, losses in curves]
    absolute = [[_positive(y) for y in losses] for _, _, losses in curves]
    depth = max(len(curves) - 1, 1)
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": escape(block.get("name")),
            "x": steps,
            "y": relative[index],
            "line": {"color": _depth_colour(index / depth), "width": 1.6},
            "hovertemplate": f"<b>{escape(block.get('name'))}</b><br>step %{{x:.0f}}: %{{y:.4g}}<extra></extra>",
        }
        for index, (block, steps, _) in enumerate(curves)
    ]
    choices = [
        ("Share of its start", "update", [{"y": relative}, {"yaxis.title.text": "Loss / loss at the start"}]),
        ("Loss", "update", [{"y": absolute}, {"yaxis.title.text": "Loss"}]),
    ]
    return {
        "data": traces,
        "layout": layout(
            xaxis=axis("Step"),
            yaxis=_log_axis("Loss / loss at the start", *relative, *absolute),
            showlegend=False,
            updatemenus=[buttons(*choices)],
        ),
    }


def training_map(blocks: list[dict]) -> dict | None:
    """All training curves as one map: blocks over progress, the colour is the loss as a share of the block's start."""
    rows = [(block, _relative(_binned(block.get("loss") or [], 80)[1])) for block in blocks]
    rows = [(block, row) for block, row in rows if any(y is not None for y in row)]
    if not rows:
        return None
    width = max(len(row) for _, row in rows)
    stretched = [[row[column * len(row) // width] for column in range(width)] for _, row in rows]
    trace = {
        "type": "heatmap",
        "x": [100 * (column + 1) / width for column in range(width)],
        "y": [block.get("index") for block, _ in rows],
        "z": [[None if y is None else math.log10(y) for y in row] for row in stretched],
        "text": [[number(y, 3) for y in row] for row in stretched],
        "hovertemplate": "block %{y}, %{x:.0f}% done<br>%{text} of its start<extra></extra>",
        "colorscale": "Viridis",
        "colorbar": {
            "title": {"text": "Share of the loss at the start", "side": "right"},
            "thickness": 12,
            "tickvals": [math.log10(share) for share in MAP_TICKS],
            "ticktext": [f"{share:g}" for share in MAP_TICKS],
        },
    }
    return {
        "data": [trace],
        "layout": layout(
            xaxis=axis("Training done (%)"),
            yaxis=axis("Block index", autorange="reversed"),
            height=min(max(220, 110 + 12 * len(rows)), 720),
            margin={"l": 64, "r": 16, "t": 16, "b": 52},
        ),
    }


def _layer_hover(layer: dict) -> str:
    return (
        f"<b>{escape(layer.get('name'))}</b><br>output error {number(layer.get('output_error'))}"
        f"<br>weight error {number(layer.get('weight_error'))}<br>{escape(layer.get('format'))}"
    )


def _positive(value: Any) -> float | None:
    """What a log axis can show."""
    return value if is_number(value) and value > 0 else None


def _log_axis(title: str, *rows: Iterable[float | None]) -> dict:
    """A log axis with round ticks that fit the spread of the values, from 1 to 7 per decade."""
    values = [y for row in rows for y in row if y is not None]
    low, high = min(values), max(values)
    if high / low < 2:  # plotly knows better how to divide a part of a decade
        return axis(title, type="log")
    steps = (1, 1.5, 2, 3, 4, 6, 8) if high / low < 20 else (1, 2, 5) if high / low < 2e4 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _binned(losses: list, max_points: int = MAX_STEPS) -> tuple[list[float], list[float | None]]:
    """(step, loss) with at most `max_points` points, each the mean of the finite losses of its bin."""
    num_points = min(len(losses), max_points)
    steps: list[float] = []
    means: list[float | None] = []
    for point in range(num_points):
        first, last = point * len(losses) // num_points, (point + 1) * len(losses) // num_points
        finite = [loss for loss in losses[first:last] if is_number(loss)]
        steps.append((first + last + 1) / 2)
        means.append(sum(finite) / len(finite) if finite else None)
    return steps, means


def _relative(losses: Iterable[float | None]) -> list[float | None]:
    """Losses divided by the first positive one; None where a log axis shows nothing."""
    positive = [_positive(loss) for loss in losses]
    start = next((loss for loss in positive if loss is not None), None)
    return [None if loss is None or start is None else loss / start for loss in positive]


def _depth_colour(share: float) -> str:
    """From light teal (first block) to dark violet (last block)."""
    first, last = (64, 180, 170), (72, 24, 110)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
    return f"rgb({red},{green},{blue})"
