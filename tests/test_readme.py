"""What the documents say exists: make targets, verbs and options of the command line, files that are linked to."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from microbat.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("docs/*.md"))))


def commands(document: str, program: str) -> list[str]:
    """Uses of ``program`` in code: lines of fenced blocks, continuation lines joined, and inline code."""
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = [line.strip() for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    start = re.compile(rf"^(?:\$ )?(?:\w+=\S+ )*{program}(?: |$)")
    return [line for line in (*fenced, *inline) if start.match(line)]


def test_readme_shows_the_two_commands():
    shown = " ".join(commands("README.md", "make"))
    assert "make demo" in shown
    assert "make test" in shown


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in commands(document, "make"):
        named = line.split("#")[0].split("make", 1)[1].split()
        assert {word for word in named if "=" not in word} <= targets, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_verbs_and_options_exist(document):
    verbs = get_command(app).commands
    for line in commands(document, "microbat"):
        words = line.split("#")[0].split("microbat", 1)[1].split()
        if not words or words[0].startswith("-"):
            continue
        assert words[0] in verbs, line
        known = {name for parameter in verbs[words[0]].params for name in parameter.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_files_exist(document):
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / document).read_text(encoding="utf-8")):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target
