"""The figures about activations before and after the transform, as plain plotly figures.

In the manner of Figures 2, 5 and 8-11 of BATQuant (arXiv:2603.16590): surfaces of |x| over (token, channel); the
values of chosen blocks after scaling, before rounding, on the format's grid; and the bimodality of all blocks.
"""

from __future__ import annotations

from typing import Any

from microbat.report.figures import AFTER, BEFORE, COLOURS, axis, buttons, layout
from microbat.report.text import escape, is_number, number, percent

NUM_BINS = 97  # odd: one bin is centred on zero
UNIFORM = 5 / 9  # bimodality coefficient of a uniform distribution; above it, a distribution may have two peaks
MAX_MARKS = 32  # a finer grid (8 bits) would paint the plot grey: only its end is marked
SIDES = (("before", "Before the transform", BEFORE), ("after", "After the transform", AFTER))


def surface(record: dict) -> dict | None:
    """Two surfaces of |activation| over (token, channel), side by side; buttons switch a shared and an own z axis."""
    sides = [(title, record[key]["surface"]) for key, title, _ in SIDES if _rows(record.get(key), "surface")]
    if not sides:
        return None
    peaks = [max((v for row in rows for v in row if is_number(v)), default=0.0) or 1.0 for _, rows in sides]
    traces, scenes, titles = [], {}, []
    for index, ((title, rows), peak) in enumerate(zip(sides, peaks, strict=True)):
        scene = f"scene{index + 1 if index else ''}"
        num_tokens, num_channels = record.get("shape") or (len(rows), len(rows[0]))
        domain = [index / len(sides), (index + 1) / len(sides)]
        traces.append(
            {
                "type": "surface",
                "scene": scene,
                "x": _centres(len(rows[0]), num_channels),
                "y": _centres(len(rows), num_tokens),
                "z": rows,
                "cmin": 0,
                "cmax": max(peaks),
                "colorscale": "Viridis",
                "showscale": False,
                "hovertemplate": "channel %{x:.0f}<br>token %{y:.0f}<br>|x| = %{z:.4g}<extra></extra>",
            }
        )
        scenes[scene] = {
            "domain": {"x": domain, "y": [0, 1]},
            "xaxis": {"title": {"text": "Channel"}},
            "yaxis": {"title": {"text": "Token"}},
            "zaxis": {"title": {"text": "|x|"}, "range": [0, max(peaks)]},
            "aspectmode": "manual",
            "aspectratio": {"x": 1.5, "y": 1.0, "z": 0.8},
            "camera": {"eye": {"x": 1.35, "y": -1.75, "z": 0.95}, "center": {"x": 0, "y": 0, "z": -0.12}},
        }
        titles.append(_caption(f"<b>{title}</b>, peak {number(peak, 3)}", sum(domain) / 2))
    names = list(scenes)
    shared = {f"{name}.zaxis.range": [0, max(peaks)] for name in names}
    own = {f"{name}.zaxis.range": [0, peak] for name, peak in zip(names, peaks, strict=True)}
    choices = [
        ("Same z axis", "update", [{"cmax": [max(peaks)] * len(peaks)}, shared]),
        ("Own z axis", "update", [{"cmax": peaks}, own]),
    ]
    return {
        "data": traces,
        "layout": layout(
            **scenes,
            annotations=titles,
            margin={"l": 0, "r": 0, "t": 84, "b": 0},
            height=470,
            updatemenus=[buttons(*choices, x=0.99) | {"y": 1.08}] if len(sides) > 1 else [],
        ),
    }


def scaled_values(record: dict) -> dict | None:
    """Histograms of chosen blocks after scaling, before rounding; a row per block, dotted lines are the grid."""
    sides = [(key, colour) for key, _, colour in SIDES if _rows(record.get(key), "scaled")]
    columns = [
        [(f"<b>{key.capitalize()}</b><br>block {block}", values, colour) for block, values in _blocks(record[key])]
        for key, colour in sides
    ]
    return _histograms(columns, record.get("grid") or [], row_height=200)


def scaled_by_method(records: list[dict]) -> dict | None:
    """The same of one layer under many methods, after each one's transform: a row per method, a column per block."""
    rows = [
        [
            (f"<b>{escape(record['label'])}</b><br>block {block}", values, COLOURS[index % len(COLOURS)])
            for block, values in _blocks(record["after"])
        ]
        for index, record in enumerate(records)
        if _rows(record.get("after"), "scaled")
    ]
    columns = [list(column) for column in zip(*rows, strict=False)]
    return _histograms(columns, records[0].get("grid") or [], row_height=150) if columns else None


def _blocks(side: dict) -> list[tuple[Any, list[float]]]:
    """Each chosen block's index and its numbers."""
    indices = side.get("blocks") or range(len(side["scaled"]))
    return [(index, [v for v in row if is_number(v)]) for index, row in zip(indices, side["scaled"], strict=False)]


def _histograms(columns: list[list[tuple[str, list[float], str]]], points: list, row_height: int) -> dict | None:
    """Panels (caption, values, colour) in columns, all on one axis; dotted lines at the grid's points."""
    if not columns:
        return None
    grid = sorted({abs(point) for point in points if is_number(point)})
    marks = grid if len(grid) <= MAX_MARKS else grid[-1:]
    panels = [panel for column in columns for panel in column]
    reach = max([*grid, *(abs(v) for _, values, _ in panels for v in values)], default=0.0) or 1.0
    num_rows, num_columns = max(len(column) for column in columns), len(columns)
    gap_x, gap_y = 0.06, 0.36 / num_rows
    width, height = (1 - gap_x * (num_columns - 1)) / num_columns, (1 - gap_y * (num_rows - 1)) / num_rows
    traces, axes, captions, lines = [], {}, [], []
    for column, its_panels in enumerate(columns):
        for row, (text, values, colour) in enumerate(its_panels):
            suffix = "" if not traces else str(len(traces) + 1)
            left, top = column * (width + gap_x), 1 - row * (height + gap_y)
            centres, shares = _histogram(values, reach)
            traces.append(
                {
                    "type": "bar",
                    "x": centres,
                    "y": shares,
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                    "marker": {"color": colour, "line": {"width": 0}},
                    "hovertemplate": "around %{x:.3g}: %{y:.2%} of the values<extra></extra>",
                }
            )
            domain_y = [max(top - height, 0), top]
            last = row == len(its_panels) - 1
            axes[f"xaxis{suffix}"] = axis(
                "x / scale" if last else "",
                domain=[left, left + width],
                anchor=f"y{suffix}",
                range=[-1.04 * reach, 1.04 * reach],
                showgrid=False,
            )
            axes[f"yaxis{suffix}"] = axis(
                "", domain=domain_y, anchor=f"x{suffix}", tickformat=".0%", nticks=4, rangemode="tozero"
            )
            lines += [_grid_line(point, suffix) for point in sorted({s * g for g in marks for s in (-1, 1)})]
            beyond = sum(abs(v) > grid[-1] for v in values) / len(values) if grid and values else None
            if beyond:
                text += f", {percent(beyond)} beyond the grid"
            captions.append(_caption(text, left + width / 2, top))
    return {
        "data": traces,
        "layout": layout(
            **axes,
            annotations=captions,
            shapes=lines,
            showlegend=False,
            bargap=0,
            height=96 + row_height * num_rows,
            margin={"l": 48, "r": 12, "t": 44, "b": 48},
        ),
    }


def bimodality(records: list[dict]) -> dict | None:
    """The bimodality coefficient of every block as box and points, before and after, one row per layer."""
    traces = []
    for key, title, colour in SIDES:
        x, y, text = [], [], []
        for record in records:
            for index, value in enumerate((record.get(key) or {}).get("bimodality") or []):
                if is_number(value):
                    x.append(value)
                    y.append(escape(record.get("layer")))
                    text.append(f"block {index}")
        if x:
            traces.append(
                {
                    "type": "box",
                    "orientation": "h",
                    "name": title,
                    "x": x,
                    "y": y,
                    "text": text,
                    "boxpoints": "all",
                    "jitter": 0.6,
                    "pointpos": 0,
                    "marker": {"color": colour, "size": 4, "opacity": 0.7},
                    "line": {"color": colour, "width": 1.5},
                    "fillcolor": "rgba(255,255,255,0)",
                    "hovertemplate": "%{y}, %{text}: %{x:.3f}<extra></extra>",
                }
            )
    if not traces:
        return None
    layers = list(dict.fromkeys(y for trace in traces for y in trace["y"]))
    references = ((1 / 3, "Gaussian 1/3"), (UNIFORM, "uniform 5/9"), (1.0, "two spikes 1"))
    lines = [
        {
            "type": "line",
            "yref": "paper",
            "x0": x,
            "x1": x,
            "y0": 0,
            "y1": 1,
            "line": {"color": "#55606b", "width": 1.2, "dash": "dash"},
        }
        for x, _ in references
    ]
    captions = [
        {"text": text, "x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 11}}
        for x, text in references
    ]
    return {
        "data": traces,
        "layout": layout(
            xaxis=axis("Bimodality coefficient of a block's scaled values", range=[0, 1.08]),
            yaxis=axis("", autorange="reversed", tickvals=layers, ticktext=[short_name(name) for name in layers]),
            boxmode="group",
            shapes=lines,
            annotations=captions,
            showlegend=True,
            legend={"orientation": "h", "y": 1, "yanchor": "top", "yref": "container", "x": 0},
            height=190 + 100 * len(layers),
            margin={"l": 64, "r": 16, "t": 72, "b": 52},
        ),
    }


def short_name(layer: str) -> str:
    """The last parts of a layer's name, from its block index on, on two lines: 11.mlp / down_proj."""
    parts = layer.split(".")
    start = max((i for i, part in enumerate(parts) if part.isdigit()), default=max(len(parts) - 2, 0))
    head, tail = ".".join(parts[start:-1]), parts[-1]
    return f"{head}<br>{tail}" if head else tail


def _rows(side: dict | None, key: str) -> bool:
    return bool(side and any(side.get(key) or []))


def _centres(num_cells: int, length: int) -> list[float]:
    """The middle index of each of `num_cells` cells over `length` positions."""
    return [(cell + 0.5) * length / num_cells - 0.5 for cell in range(num_cells)]


def _caption(text: str, x: float, y: float = 1.0) -> dict:
    return {
        "text": text,
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 13},
    }


def _grid_line(point: float, suffix: str) -> dict:
    return {
        "type": "line",
        "xref": f"x{suffix}",
        "yref": f"y{suffix} domain",
        "x0": point,
        "x1": point,
        "y0": 0,
        "y1": 1,
        "line": {"color": "#8a94a0", "width": 1, "dash": "dot"},
        "layer": "below",
    }


def _histogram(values: list[float], reach: float) -> tuple[list[float], list[float]]:
    """Centres of NUM_BINS equal bins over [-reach, reach] and the share of the values in each."""
    counts = [0] * NUM_BINS
    for value in values:
        counts[min(max(int((value + reach) / (2 * reach) * NUM_BINS), 0), NUM_BINS - 1)] += 1
    centres = [(index + 0.5) / NUM_BINS * 2 * reach - reach for index in range(NUM_BINS)]
    return centres, [count / max(len(values), 1) for count in counts]
