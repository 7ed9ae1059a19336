"""``python -m microbat``: the command line where its script is not on the path."""

from microbat.cli import app

app()
