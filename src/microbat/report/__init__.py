"""One self-contained HTML page per run: what was quantized, how, and what it cost where."""

from microbat.report.activations import activation_record, bimodality
from microbat.report.page import write_page

__all__ = ["activation_record", "bimodality", "write_page"]
