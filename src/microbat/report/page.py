"""Self-contained HTML pages, first of all that of a run's report: no network, one file that can be mailed and kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from microbat.report import experts, sections, theme
from microbat.report.text import escape

# The browser itself refuses whatever the page would load from elsewhere. 'unsafe-eval': plotly compiles functions.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'unsafe-inline' 'unsafe-eval'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
    )
)
PARTS = (
    sections.headline,
    sections.recipe,
    sections.errors,
    sections.training,
    experts.experts,
    sections.activations,
    sections.layer_table,
)
LINKS = (
    ("quality", "Quality"),
    ("recipe", "Recipe"),
    ("errors", "Where the error is"),
    ("training", "Training"),
    ("experts", "Experts"),
    ("activations", "Activations"),
    ("layers", "All layers"),
)


def write_page(report: dict, path: Path) -> Path:
    """Write the page of one run to `path` and return it; `report` is the content of the run's report.json.

    A section whose data is missing is left out. The file appears whole or not at all. Raises ImportError when plotly
    is not installed.
    """
    return write(render(report, plotly_script()), Path(path))


def write(page: str, path: Path) -> Path:
    """Write a page whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def render(report: dict, plotly_script: str) -> str:
    """The page as text, around the given source of plotly.js."""
    body = "".join(part(report) for part in PARTS)
    under = " · ".join(str(report[key]) for key in ("scheme", "method", "solver") if report.get(key))
    return frame(report.get("model") or "Quantized model", under, LINKS, body, report.get("microbat"), plotly_script)


def frame(
    title: Any, under: str, links: tuple[tuple[str, str], ...], body: str, version: Any, plotly_script: str
) -> str:
    """A whole page around its sections; a link to a section that is not there is left out."""
    anchors = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in links if f'id="{anchor}"' in body)
    title, under = escape(title), escape(under)
    scripts = f"<script>{plotly_script}</script>" if 'class="figure"' in body else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title} {under}</title><style>{theme.CSS}</style></head>\n<body><main>"
        f'<header><h1>{title}</h1><p class="under">{under}</p></header>\n<nav>{anchors}</nav>\n{body}\n'
        f"<footer>Written by microbat {escape(version)}. "
        f"This page is complete in itself and loads nothing.</footer></main>\n{scripts}\n"
        f"<script>{theme.SCRIPT}</script></body></html>\n"
    )


def plotly_script() -> str:
    """The source of plotly.js, fit to stand in a script element."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'microbat[report]'") from error
    return get_plotlyjs().replace("</script", "<\\/script")
