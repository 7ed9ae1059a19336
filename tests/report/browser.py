"""A page as a browser sees it: its elements, and its DOM after a headless Chromium has run it."""

from __future__ import annotations

import subprocess
from html.parser import HTMLParser
from pathlib import Path


class Elements(HTMLParser):
    """All elements of a page as (tag, attributes), and what each script contains."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.scripts: dict[str, str] = {}
        self.open_script: str | None = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.open_script = dict(attrs).get("id", "")

    def handle_endtag(self, tag):
        if tag == "script":
            self.open_script = None

    def handle_data(self, data):
        if self.open_script is not None:
            self.scripts[self.open_script] = self.scripts.get(self.open_script, "") + data

    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.found if "id" in attributes}


def dump_dom(browser: str, page: Path, profile: Path) -> str:
    flags = (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage --use-gl=angle --use-angle=swiftshader "
        "--enable-unsafe-swiftshader --virtual-time-budget=60000 --dump-dom"
    )
    command = [browser, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
