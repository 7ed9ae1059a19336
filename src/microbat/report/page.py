"""One self-contained HTML page from a run's report: no network, one file that can be mailed and kept."""

from __future__ import annotations

import os
from pathlib import Path

from microbat.report import sections, theme
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
    sections.activations,
    sections.layer_table,
)
LINKS = (
    ("quality", "Quality"),
    ("recipe", "Recipe"),
    ("errors", "Where the error is"),
    ("training", "Training"),
    ("activations", "Activations"),
    ("layers", "All layers"),
)


def write_page(report: dict, path: Path) -> Path:
    """Write the page of one run to `path` and return it; `report` is the content of the run's report.json.

    A section whose data is missing is left out. The file appears whole or not at all. Raises ImportError when plotly
    is not installed.
    """
    path = Path(path)
    page = render(report, _plotly_script())
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
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in LINKS if f'id="{anchor}"' in body)
    model = escape(report.get("model") or "Quantized model")
    scheme = escape(" · ".join(str(report[key]) for key in ("scheme", "method", "solver") if report.get(key)))
    scripts = f"<script>{plotly_script}</script>" if 'class="figure"' in body else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{model} {scheme}</title><style>{theme.CSS}</style></head>\n<body><main>"
        f'<header><h1>{model}</h1><p class="under">{scheme}</p></header>\n<nav>{links}</nav>\n{body}\n'
        f"<footer>Written by microbat {escape(report.get('microbat'))}. "
        f"This page is complete in itself and loads nothing.</footer></main>\n{scripts}\n"
        f"<script>{theme.SCRIPT}</script></body></html>\n"
    )


def _plotly_script() -> str:
    """The source of plotly.js, fit to stand in a script element."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'microbat[report]'") from error
    return get_plotlyjs().replace("</script", "<\\/script")
