"""The sections of the page: each a function from the report to HTML, empty when its data is missing."""

from __future__ import annotations

import json
import math
from typing import Any

from microbat.report import distributions, figures
from microbat.report.text import DASH, duration, escape, extent, fixed, is_number, number, percent, size
from microbat.report.verdict import ratio, rows_of_interest, verdict

NUM_OPEN_LAYERS = 4  # layers whose surfaces are drawn at once: two WebGL views each, of the 16 that browsers keep


def headline(report: dict) -> str:
    """The verdict, the run's key facts and the table of the evaluations."""
    parts = [f'<p class="verdict" id="verdict">{escape(verdict(report))}</p>', _facts(report)]
    evaluation = report.get("evaluation") or {}
    if evaluation.get("rows"):
        parts += [
            f'<h2 id="quality">Quality</h2><p class="how">{escape(_protocol(evaluation))}</p>',
            _evaluation_table(report),
        ]
    return "".join(parts)


def recipe(report: dict) -> str:
    """Method, solver, scheme and formats, with all hyper-parameters behind a fold."""
    formats = report.get("formats") or {}
    rows = [(name, report.get(name)) for name in ("model", "family", "method", "solver", "scheme") if report.get(name)]
    rows += [(f"{role} format", _format(value)) for role, value in formats.items()]
    settings = report.get("recipe") or {}
    if settings.get("seed") is not None:
        rows.append(("seed", settings["seed"]))
    if not rows and not settings:
        return ""
    body = "".join(f"<tr><th>{escape(name.capitalize())}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    fold = (
        f"<details id='recipe-details'><summary>All hyper-parameters</summary>{tree(settings)}</details>"
        if settings
        else ""
    )
    return section(
        "recipe",
        "Recipe",
        "Everything that decides the result; the run's recipe file holds the same values and reproduces it.",
        f'<div class="scroll"><table class="pairs">{body}</table></div>{fold}',
    )


def errors(report: dict) -> str:
    """The error of each layer and of each block."""
    layers, blocks = report.get("layers") or [], report.get("blocks") or []
    plots = [
        ("fig-layers", "", figures.layer_errors(layers)),
        ("fig-blocks", "<h3>Error after each whole block</h3>", figures.block_errors(blocks)),
    ]
    content = "".join(title + figure_html(name, figure) for name, title, figure in plots if figure)
    worst = max(
        (layer for layer in layers if is_number(layer.get("output_error"))),
        key=lambda row: row["output_error"],
        default=None,
    )
    how = (
        "Each point is one layer: the energy of its error relative to the energy of its float values; "
        "lower is better, the axis is logarithmic. Click a name in the legend to hide it. After a whole block: the energy "
        "of the distance between the quantized and the float model's hidden state over that of the latter, mean over tokens."
    )
    if worst:
        how += f" The largest output error is {number(worst['output_error'], 3)}, in {worst.get('name')}."
    return section("errors", "Where the error is", how, content) if content else ""


def training(report: dict) -> str:
    """The loss of each block over its training steps, as lines and as a map."""
    blocks = report.get("blocks") or []
    curves = figures.training_curves(blocks)
    if not curves:
        return ""
    options = "".join(f'<option value="{index}">{trace["name"]}</option>' for index, trace in enumerate(curves["data"]))
    tools = (
        '<div class="tools"><label>Highlight <select data-highlights="fig-training">'
        '<option value="">all blocks</option>'
        f"{options}</select></label></div>"
    )
    content = tools + figure_html("fig-training", curves)
    if len(curves["data"]) > 1:
        content += "<h3>All blocks at a glance</h3>" + figure_html("fig-training-map", figures.training_map(blocks))
    how = (
        "Each line is one block, from light (first) to dark (last); a line that still falls at its end would gain "
        "from more steps, one that rises has too high a learning rate."
    )
    return section("training", "Training", how, content)


def activations(report: dict) -> str:
    """The activations of the worst layers before and after their transform."""
    records = report.get("activations") or []
    if not records:
        return ""
    how = (
        "The recorded layers, as the run ranked them: a good transform lowers the ridges of the surface without "
        "raising the plain around them, and spreads a block's scaled values over the format's grid in one hill "
        "rather than two."
    )
    return section("activations", "Activations before and after the transform", how, activation_plots(records))


def activation_plots(records: list[dict], num_open: int = NUM_OPEN_LAYERS) -> str:
    """The figures of each record, the first few open, and all records in one view of their bimodality."""
    plots = (_activation(index, record, index < num_open) for index, record in enumerate(records))
    return "".join(plots) + _bimodality(records)


def layer_table(report: dict) -> str:
    """All quantized layers in a table that sorts and filters, those outside the blocks last."""
    layers = [*(report.get("layers") or []), *(report.get("outside") or [])]
    if not layers:
        return ""
    heads = ("Name", "Shape", "Format", "Bits", "Weight error", "Output error", "Transform", "Parameters")
    numeric = {"Bits", "Weight error", "Output error", "Parameters"}
    head = "".join(f'<th{_class(name in numeric)}><button type="button">{name}</button></th>' for name in heads)
    rows = "".join(_layer_row(layer) for layer in layers)
    table = (
        '<div class="tools"><label>Filter '
        '<input type="search" data-filters="table-layers" placeholder="down_proj"></label></div>'
        f'<div class="scroll tall"><table class="sortable" id="table-layers">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return section(
        "layers", "All layers", f"{len(layers)} quantized layers; click a column's name to sort by it.", table
    )


def section(anchor: str, title: str, how: str, content: str) -> str:
    return f'<section><h2 id="{anchor}">{escape(title)}</h2><p class="how">{escape(how)}</p>{content}</section>'


def figure_html(name: str, figure: dict) -> str:
    """A place for the figure and its data, which stays inert text until the page's script reads it."""
    return (
        f'<div class="figure" id="{name}" style="min-height:{figure["layout"]["height"]}px"></div>'
        f'<script type="application/json" id="{name}-data">{json_in_html(figure)}</script>'
    )


def json_in_html(value: Any) -> str:
    """JSON that can stand in a script element: no character of it can end the element; not finite becomes null."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))  # ASCII: other characters are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _facts(report: dict) -> str:
    num_bytes = report.get("bytes") or {}
    total, bf16 = num_bytes.get("total"), num_bytes.get("bf16_total")
    share = f"{percent(total / bf16)} of {size(bf16)} in bf16" if is_number(total) and is_number(bf16) and bf16 else ""
    facts = [
        (
            "Bits per weight",
            report.get("bits_per_weight"),
            fixed(report.get("bits_per_weight"), 2),
            "in the quantized layers",
        ),
        ("Size of the model", total, size(total), share),
        (
            "Quantized layers",
            num_bytes.get("quantized_layers"),
            size(num_bytes.get("quantized_layers")),
            "codes and scales",
        ),
        ("Transforms", num_bytes.get("transforms"), size(num_bytes.get("transforms")), ""),
        ("Everything else", num_bytes.get("other"), size(num_bytes.get("other")), "embeddings, norms"),
        ("Time", report.get("seconds"), duration(report.get("seconds")), _where(report)),
        ("Peak memory", report.get("peak_memory_bytes"), size(report.get("peak_memory_bytes")), ""),
    ]
    cells = [
        f"<div><dt>{name}</dt><dd>{escape(text)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, text, note in facts
        if value is not None
    ]
    return f'<dl class="facts" id="facts">{"".join(cells)}</dl>' if cells else ""


def _where(report: dict) -> str:
    """What took the time, and on what."""
    spent = (report.get("distillation") or {}).get("seconds")
    notes = [f"{duration(spent)} of it distillation"] if is_number(spent) else []
    return "; ".join([*notes, *([str(report["machine"])] if report.get("machine") else [])])


def _protocol(evaluation: dict) -> str:
    """How to read the table, and on what text its numbers were measured."""
    text = (
        "Lower is better for perplexity and KL divergence (nats per token, from the float model), "
        "higher for top-1 agreement with it."
    )
    measured = [f"on {evaluation['text']}"] if evaluation.get("text") else []
    measured += [extent(evaluation)] if "window" in evaluation else []
    measured += [f"{number(evaluation['tokens'])} predicted tokens"] if is_number(evaluation.get("tokens")) else []
    return f"{text} Measured {', '.join(measured)}." if measured else text


def _evaluation_table(report: dict) -> str:
    reference, chosen, _ = rows_of_interest(report)
    head = "".join(
        f"<th{_class(n > 0)}>{name}</th>"
        for n, name in enumerate(("Model", "Perplexity", "× float", "KL", "Top-1 agreement"))
    )
    body = "".join(
        f"<tr{' class=chosen' if row is chosen else ''}><td>{escape(row.get('name'))}</td>"
        f'<td class="n">{number(row.get("perplexity"))}</td><td class="n">{fixed(ratio(row, reference), 3)}</td>'
        f'<td class="n">{fixed(row.get("kl"), 4)}</td><td class="n">{percent(row.get("top1"))}</td></tr>'
        for row in report["evaluation"]["rows"]
    )
    return (
        f'<div class="scroll"><table id="table-evaluation"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _format(value: Any) -> str:
    if value is None:
        return "float (not quantized)"
    if not isinstance(value, dict):
        return str(value)
    extra = ", ".join(
        f"{key.replace('_', ' ')} {item}" for key, item in value.items() if key != "name" and item is not None
    )
    return f"{value.get('name', DASH)} ({extra})" if extra else str(value.get("name", DASH))


def tree(value: Any) -> str:
    """Nested dicts and lists of dicts as nested folds, their plain values as a table."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    plain = [(key, item) for key, item in items if not _is_nested(item)]
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_plain(item))}</td></tr>" for key, item in plain)
    folds = "".join(
        f'<details class="step" open><summary>{escape(key)}</summary>{tree(item)}</details>'
        for key, item in items
        if _is_nested(item)
    )
    return (f'<table class="pairs">{rows}</table>' if rows else "") + folds


def _is_nested(value: Any) -> bool:
    return bool(value) and (
        isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _activation(index: int, record: dict, is_open: bool) -> str:
    plots = [
        (f"fig-surface-{index}", "", distributions.surface(record)),
        (
            f"fig-scaled-{index}",
            '<p class="how">Values of chosen blocks divided by their scale, before rounding; '
            "dotted lines are the values that the format can hold (of an 8-bit format, the largest only).</p>",
            distributions.scaled_values(record),
        ),
    ]
    content = "".join(intro + figure_html(name, figure) for name, intro, figure in plots if figure)
    if not content:
        return ""
    if is_open:
        return f"<h3>{escape(record.get('layer'))}</h3>{content}"
    return f'<details class="lazy"><summary>{escape(record.get("layer"))}</summary>{content}</details>'


def _bimodality(records: list[dict]) -> str:
    figure = distributions.bimodality(records)
    if not figure:
        return ""
    how = (
        "(skew² + 1) / kurtosis of each block's scaled values, one point per block: a uniform distribution has 5/9, "
        "a Gaussian 1/3; well beyond 5/9 lie two peaks, which waste the middle of the grid, or a heavy lopsided tail."
    )
    return f'<h3>Bimodality of the blocks</h3><p class="how">{escape(how)}</p>' + figure_html("fig-bimodality", figure)


def _layer_row(layer: dict) -> str:
    shape = layer.get("shape") or []
    text = " × ".join(str(n) for n in shape) or DASH
    cells = [
        f"<td>{escape(layer.get('name'))}</td>",
        f'<td data-v="{math.prod(n for n in shape if is_number(n)) if shape else ""}">{escape(text)}</td>',
        f"<td>{escape(layer.get('format'))}</td>",
        _number_cell(layer.get("bits"), 3),
        _number_cell(layer.get("weight_error"), 4),
        _number_cell(layer.get("output_error"), 4),
        f"<td>{escape(layer.get('transform'))}</td>",
        _number_cell(layer.get("transform_params"), 4),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _number_cell(value: Any, digits: int) -> str:
    return f'<td class="n" data-v="{value if is_number(value) else ""}">{number(value, digits)}</td>'


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""
