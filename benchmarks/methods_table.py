"""Every method and last step on one model, the same calibration and the same evaluation windows: a Markdown table.

    python benchmarks/methods_table.py MODEL --text wiki.test.raw --calibration wiki.valid.txt --out runs

What is in the output folder already is not made again, so that an interrupted table goes on.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

import microbat

HADAMARD = {"transform": "hadamard", "epochs": 0, "clip": False, "weight_clip": False}
ROWS = {
    "RTN": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},
    "block-Hadamard + RTN": {"method": "batquant", "solver": "rtn", "settings": HADAMARD},
    "block-Hadamard + GPTQ": {"method": "batquant", "solver": "gptq", "settings": HADAMARD},
    "BATQuant + RTN": {"method": "batquant", "solver": "rtn"},
    "BATQuant + GPTQ": {"method": "batquant", "solver": "gptq"},
    "BATQuant + learned rounding": {"method": "batquant", "solver": "learned"},
}


def main(
    model: str,
    text: Annotated[str, typer.Option(help="Evaluation text: a name or a file.")] = "wikitext-2-raw",
    calibration: Annotated[str, typer.Option(help="self, a file, or a data set of the hub.")] = "self",
    schemes: Annotated[str, typer.Option(help="Comma-separated.")] = "W4A4KV16,W4A8KV16",
    windows: Annotated[int, typer.Option(help="Windows of 1024 tokens.")] = 16,
    rows: Annotated[str, typer.Option(help="Only the rows whose name contains this.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the quantized models and the numbers.")] = Path("methods-table"),
) -> None:
    """Quantize with every method, evaluate, print."""
    chosen = {name: options for name, options in ROWS.items() if rows in name}
    scores: dict[str, dict[str, dict]] = {}
    for scheme in schemes.split(","):
        folders = {"float": model}
        for name, options in chosen.items():
            folder = out / scheme / name.replace(" ", "_")
            if not folder.exists():
                microbat.quantize(model, out=folder, scheme=scheme, calibration=calibration, **options)
            folders[name] = folder
        numbers = out / scheme / "evaluation.json"
        result = microbat.evaluate(folders, text=text, windows=windows)
        numbers.write_text(json.dumps(result, indent=1) + "\n")
        scores[scheme] = {row["name"]: row for row in result["rows"]}
    print("\n| method | " + " | ".join(f"{s} perplexity | times float" for s in scores) + " |")
    print("| --- |" + " ---: | ---: |" * len(scores))
    for name in ["float", *chosen]:
        cells = (f"{by[name]['perplexity']:.2f} | {by[name]['ratio']:.3f}" for by in scores.values())
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
