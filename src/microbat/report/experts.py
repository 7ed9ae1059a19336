"""The section about experts: how many calibration tokens each saw, and what was done for those that saw few."""

from __future__ import annotations

import math
import statistics

from microbat.report import figures
from microbat.report.sections import figure_html, section
from microbat.report.text import escape, is_number, number

HEADS = ("Block", "Experts", "Fewest tokens", "Median", "Most", "Below the floor", "Without a token")
TICKS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


def experts(report: dict) -> str:
    """Tokens of each expert, by block, as a map and a table; empty for a model without experts."""
    blocks = [block for block in report.get("blocks") or [] if _tokens(block)]
    if not blocks:
        return ""
    head = "".join(f"<th{'' if name == 'Block' else ' class=n'}>{name}</th>" for name in HEADS)
    rows = "".join(map(_row, blocks))
    table = f'<table id="table-experts"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    content = f'{figure_html("fig-experts", _map(blocks))}<div class="scroll tall">{table}</div>'
    return section("experts", "Experts", _how(blocks), content)


def _tokens(block: dict) -> list[int]:
    return [count for count in block.get("expert_tokens") or [] if is_number(count)]


def _how(blocks: list[dict]) -> str:
    floors = {block.get("expert_floor") for block in blocks}
    floor = max((floor for floor in floors if is_number(floor)), default=0)
    how = (
        "Calibration tokens that the router sent to each expert. What happens to their inputs (transform, clip, format) is the "
        "same for all experts of a block; "
    )
    if floors == {None}:
        return f"{how}the solver rounds their weights without statistics of their inputs."
    if not floor:
        return f"{how}the statistics for rounding are each expert's own."
    num, low = sum(len(_tokens(block)) for block in blocks), sum(map(_low, blocks))
    return (
        f"{how}the statistics for rounding are each expert's own, and for the {number(low)} of {number(num)} that saw "
        f"fewer than {number(floor)} tokens, average tokens of the block, sent through that expert, make up for what was missing."
    )


def _low(block: dict) -> int:
    """How many experts of a block saw fewer tokens than its floor."""
    floor = block.get("expert_floor")
    return sum(count < floor for count in _tokens(block)) if is_number(floor) else 0


def _row(block: dict) -> str:
    counts = _tokens(block)
    numbers = (
        len(counts),
        min(counts),
        round(statistics.median(counts)),
        max(counts),
        _low(block) if is_number(block.get("expert_floor")) else None,
        counts.count(0),
    )
    cells = "".join(f'<td class="n">{number(value)}</td>' for value in numbers)
    return f"<tr><td>{escape(block.get('name'))}</td>{cells}</tr>"


def _map(blocks: list[dict]) -> dict:
    """Blocks over experts, the colour is the logarithm of the tokens; experts without one are blank."""
    rows = [_tokens(block) for block in blocks]
    trace = {
        "type": "heatmap",
        "x": list(range(max(map(len, rows)))),
        "y": [block.get("index") for block in blocks],
        "z": [[math.log10(count) if count else None for count in row] for row in rows],
        "text": [[number(count) for count in row] for row in rows],
        "hoverongaps": True,
        "hovertemplate": "block %{y}, expert %{x}<br>%{text} tokens<extra></extra>",
        "colorscale": "Viridis",
        "colorbar": {
            "title": {"text": "Tokens", "side": "right"},
            "thickness": 12,
            "tickvals": [math.log10(tick) for tick in TICKS],
            "ticktext": [f"{tick:,}" for tick in TICKS],
        },
    }
    return {
        "data": [trace],
        "layout": figures.layout(
            xaxis=figures.axis("Expert"),
            yaxis=figures.axis("Block index", autorange="reversed", dtick=1 if len(rows) < 12 else None),
            height=min(max(220, 110 + 12 * len(rows)), 720),
            margin={"l": 64, "r": 16, "t": 16, "b": 52},
        ),
    }
