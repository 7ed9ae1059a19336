"""The command line: verbs over :mod:`microbat.pipeline` and its neighbours. Errors of the user's making print one line and
exit with 2."""

from microbat.cli.app import app
from microbat.cli.execution import bench, generate
from microbat.cli.folders import export, inspect, verify
from microbat.cli.listing import list_
from microbat.cli.measurement import compare, evaluate
from microbat.cli.quantization import quantize

VERBS = {
    "quantize": quantize,
    "eval": evaluate,
    "compare": compare,
    "generate": generate,
    "bench": bench,
    "inspect": inspect,
    "verify": verify,
    "export": export,
    "list": list_,
}

for name, verb in VERBS.items():
    app.command(name)(verb)
