"""What a model can do, and what quantization cost it."""

from microbat.evaluate.quality import Comparison, Perplexity, Row, compare, perplexity, recovery
from microbat.evaluate.tasks import run_tasks, task_names
from microbat.evaluate.text import NamedText, load_text, text_names
from microbat.evaluate.windows import Windows, tokenize, windows

__all__ = [
    "Comparison",
    "NamedText",
    "Perplexity",
    "Row",
    "Windows",
    "compare",
    "load_text",
    "perplexity",
    "recovery",
    "run_tasks",
    "task_names",
    "text_names",
    "tokenize",
    "windows",
]
