"""Other quantization tools and microbat on one model: the same calibration tokens, bits and evaluation; a Markdown table.

    pip install -e '.[peers]'
    python benchmarks/peers.py MODEL --text wiki.test.raw --calibration wiki.valid.txt --out peers

Each peer quantizes by its own code in a process of its own, since peers change the libraries that they import; its model
is then measured there by microbat's perplexity, as microbat's own models are. A peer that is not installed is left out.
What is in the output folder already is not made again, so that an interrupted run goes on. Seconds are those that the
processor spent on quantizing, which other work on the machine does not change; JSON has the clock's too.
"""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peer_quantizers import PEERS, check_products
from safetensors.torch import load_file
from torch import nn

from microbat import Recipe, pipeline
from microbat.account import processor
from microbat.calibrate.data import Calibration
from microbat.evaluation.quality import compare
from microbat.export.folder import write_json
from microbat.measure import text_windows
from microbat.runtime.load import load_dequantized
from microbat.scheme import Scheme

PRESETS = {"W4A4KV16": "MXFP4", "W4A4KV16:nvfp4": "NVFP4"}  # our schemes, the peers' names for them
ONCE = {"epochs": 1, "refine_epochs": 1, "distill_epochs": 1}  # as in suites/small.yaml
CHECKED_TOKENS = 64  # of the first window, on which every product is looked at


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method by a peer, or by microbat where ``peer`` is empty; ``options`` are arguments of its own."""

    method: str
    peer: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    schemes: tuple[str, ...] = tuple(PRESETS)

    @property
    def name(self) -> str:
        return f"{self.peer or 'microbat'} {self.method}"


ROWS = (
    Row(method="GPTQ", peer="llm-compressor"),
    Row(method="block-Hadamard + GPTQ", peer="llm-compressor", options={"hadamard": 32}, schemes=("W4A4KV16",)),
    Row(method="AutoRound", peer="AutoRound"),
    Row(method="AutoRound, rceil scales", peer="AutoRound", options={"rceil": True}, schemes=("W4A4KV16",)),
    Row(method="GPTQ", options={"method": "gptq"}),
    Row(method="block-Hadamard + GPTQ", options={"method": "block-hadamard", "solver": "gptq"}, schemes=("W4A4KV16",)),
    Row(method="BATQuant + GPTQ", options={"method": "batquant", "solver": "gptq", "settings": ONCE}),
    Row(method="BATQuant + learned rounding", options={"method": "batquant", "solver": "learned", "settings": ONCE}),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row at one scheme, and everything that decides its numbers."""

    row: Row
    scheme: str
    model: str
    calibration: str
    samples: int
    length: int
    text: str
    window: int
    windows: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / self.scheme.replace(":", "-") / self.row.name.replace(",", "").replace(" ", "_")

    @property
    def tokens(self) -> Path:
        return self.out / "tokens.safetensors"

    @property
    def protocol(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "out"}

    def recipe(self) -> Recipe:
        return Recipe(
            model=self.model,
            scheme=self.scheme,
            calibration=self.calibration,
            num_calibration_samples=self.samples,
            max_seq_length=self.length,
            **({} if self.row.peer else self.row.options),
        )

    def result(self) -> dict[str, Any] | None:
        """What was measured before; ValueError where it was measured in another way."""
        file = self.folder / "result.json"
        if not file.is_file():
            return None
        kept = json.loads(file.read_text())
        if kept["protocol"] != json.loads(json.dumps(self.protocol)):
            raise ValueError(f"{self.folder} was made with other settings; remove it or choose another output folder")
        return kept["result"]


def main(
    model: Annotated[str, typer.Argument(help="Folder or name on the hub of the float model.")],
    text: Annotated[str, typer.Option(help="Evaluation text: a name or a file.")] = "wikitext-2-raw",
    calibration: Annotated[str, typer.Option(help="self, a file, or a data set of the hub.")] = "self",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    window: Annotated[int, typer.Option(help="Tokens in an evaluation window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Evaluation windows.")] = 16,
    schemes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(PRESETS),
    rows: Annotated[str, typer.Option(help="Only the rows whose name contains this.")] = "",
    autoround_iters: Annotated[int, typer.Option(help="AutoRound's iterations a block.")] = 200,
    autoround_batch: Annotated[int, typer.Option(help="AutoRound's sequences an iteration.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for the quantized models and the numbers.")] = Path("peers"),
) -> dict[str, Any]:
    """Quantize with every tool, evaluate, print; the numbers are kept in OUT/peers.json."""
    chosen = schemes.split(",")
    if not set(chosen) <= set(PRESETS):
        raise ValueError(f"schemes {schemes!r}: the peers have {', '.join(PRESETS)}")
    shared = {"model": model, "calibration": calibration, "samples": samples, "length": length}
    shared |= {"text": text, "window": window, "windows": windows, "out": out}
    cells, skipped = [], []
    for row in (row for row in ROWS if rows in row.name):
        if row.peer == "AutoRound":
            row = replace(row, options={"iters": autoround_iters, "batch": autoround_batch, **row.options})
        if row.peer and PEERS[row.peer].version is None:
            skipped.append(f"{row.name}: not installed; pip install 'microbat[peers]'")
        else:
            cells += [Cell(row=row, scheme=s, **shared) for s in chosen if s in row.schemes]
    waiting = [cell for cell in cells if cell.result() is None]
    for reason in skipped:
        print(f"skipped {reason}", flush=True)
    for number, cell in enumerate(waiting, 1):
        print(f"{number}/{len(waiting)} {cell.scheme} {cell.row.name}", flush=True)
        cell.folder.mkdir(parents=True, exist_ok=True)
        pipeline.write_tokens(cell.recipe(), cell.tokens)
        if not cell.row.peer:
            measure_ours(cell)
        elif not in_a_process_of_its_own(measure_peer, cell):
            skipped.append(f"{cell.row.name} at {cell.scheme}: failed, see {cell.folder.name}/log.txt")
    content = summary([cell for cell in cells if cell.result() is not None], skipped, shared)
    write_json(out / "peers.json", content)
    print(table(content))
    return content


class Stopwatch:
    """Seconds of the clock and of the processor since it was made."""

    def __init__(self) -> None:
        self.clock, self.processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        clock, processor = time.perf_counter() - self.clock, time.process_time() - self.processor
        return {"seconds": clock, "processor_seconds": processor}


def measure_ours(cell: Cell) -> None:
    """A run that was interrupted has its model, and no times."""
    folder, times = cell.folder / "model", cell.folder / "times.json"
    if not folder.exists():
        resumed, watch = folder.with_name("model.partial").exists(), Stopwatch()
        pipeline.run(cell.recipe(), folder, tokens=cell.tokens, title=f"{cell.row.method} {cell.scheme}")
        if not resumed:
            write_json(times, watch.read())
    measure(cell, load_dequantized(folder), json.loads(times.read_text()) if times.is_file() else {}, {})


def measure_peer(cell: Cell) -> None:
    """What the peer and its libraries print goes to the cell's log."""
    with (cell.folder / "log.txt").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    peer, tokens_SL = PEERS[cell.row.peer], load_file(cell.tokens)["tokens"]
    model, tokenizer = pipeline.load(cell.model), pipeline.tokenizer_of(cell.model)
    watch = Stopwatch()
    quantized = peer.quantize(model, tokenizer, tokens_SL, PRESETS[cell.scheme], **cell.row.options)
    measure(cell, quantized, watch.read(), {cell.row.peer: peer.version})


def in_a_process_of_its_own(function: Callable[[Cell], None], cell: Cell) -> bool:
    """Whether it came to its end there."""
    process = get_context("spawn").Process(target=function, args=(cell,))
    process.start()
    process.join()
    return process.exitcode == 0


def measure(cell: Cell, quantized: nn.Module, times: dict[str, float], versions: dict[str, Any]) -> None:
    """Perplexity and distance from the float model, after a look at whether the model computes in the format."""
    floats = pipeline.load(cell.model)
    _, cut = text_windows(cell.model, cell.text, cell.window, cell.windows)
    block = Scheme.parse(cell.scheme).block
    layers = check_products(quantized, floats, cut.tokens_WT[0, :CHECKED_TOKENS], block)
    result = asdict(compare({"float": floats, "quantized": quantized}, "float", cut, progress=not cell.row.peer))
    reference, row = result.pop("rows")
    result |= {"float": reference, "quantized": row, "times": times, "layers_in_4_bits": layers}
    result["versions"] = versions | {name: version(name) for name in ("microbat", "torch", "transformers")}
    write_json(cell.folder / "result.json", {"protocol": cell.protocol, "result": result})


def summary(cells: list[Cell], skipped: list[str], shared: dict[str, Any]) -> dict[str, Any]:
    """The table as plain data, without the paths of this machine."""
    entries: list[dict[str, Any]] = []
    for cell in cells:
        result = cell.result()
        entries.append(
            {
                "scheme": cell.scheme,
                "tool": cell.row.peer or "microbat",
                "method": cell.row.method,
                "options": cell.row.options,
                **result["times"],
                **{name: value for name, value in result["quantized"].items() if name != "name"},
                "layers_in_4_bits": result["layers_in_4_bits"],
                "versions": result["versions"],
            }
        )
    for entry in entries:
        if entry["tool"] == "microbat":
            entry["against"] = against(entry, [e for e in entries if e["scheme"] == entry["scheme"]])
    named = {name: Path(shared[name]).name for name in ("model", "calibration", "text") if Path(shared[name]).exists()}
    settings = {name: value for name, value in shared.items() if name != "out"} | named
    first = cells[0].result() if cells else {"float": None}
    if cells:
        tokens = load_file(cells[0].tokens)["tokens"]
        settings["calibration_fingerprint"] = Calibration(tokens=tokens, source="").fingerprint
    return {
        "settings": settings,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "float": first["float"],
        "rows": entries,
        "skipped": skipped,
    }


def against(ours: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Our perplexity over that of a peer's same method, or of the peers' best where none has it, and the error of it
    over the windows, which both were measured on."""
    peers = [entry for entry in entries if entry["tool"] != "microbat"]
    peers = [entry for entry in peers if entry["method"] == ours["method"]] or peers
    if not peers:
        return None
    peer = min(peers, key=lambda entry: entry["perplexity"])
    ratio = ours["perplexity"] / peer["perplexity"]
    excess_W = [a - b for a, b in zip(ours["window_nll"], peer["window_nll"], strict=True)]
    error = ratio * statistics.stdev(excess_W) / math.sqrt(len(excess_W)) if len(excess_W) > 1 else None
    return {"tool": peer["tool"], "method": peer["method"], "ratio": ratio, "ratio_stderr": error}


def table(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "",
        "| scheme | tool | method | perplexity | times float | KL | seconds | ours / peer |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    if content["float"]:
        lines.append(f"| | | float | {content['float']['perplexity']:.2f} | 1.000 | 0 | | |")
    for row in content["rows"]:
        seconds = f"{row['processor_seconds']:.0f}" if "processor_seconds" in row else ""
        numbers = f"{row['perplexity']:.2f} | {row['ratio']:.3f} | {row['kl']:.3f} | {seconds}"
        cells = (row["scheme"], f"{row['tool']} {row['versions'][row['tool']]}", row["method"], numbers, _beside(row))
        lines.append(f"| {' | '.join(cells)} |")
    schedules = {(r["options"]["iters"], r["options"]["batch"]) for r in content["rows"] if r["tool"] == "AutoRound"}
    for iters, batch in schedules - {(200, 8)}:
        lines.append(f"\nAutoRound: {iters} iterations a block in batches of {batch}; its defaults are 200 and 8.")
    lines += [f"\nSkipped {reason}" for reason in content["skipped"]]
    lines.append(f"\n{content['processor']}, {content['threads']} threads")
    return "\n".join(lines)


def _beside(row: dict[str, Any]) -> str:
    other = row.get("against")
    if not other:
        return ""
    error = "" if other["ratio_stderr"] is None else f" ± {other['ratio_stderr']:.3f}"
    return f"{other['ratio']:.3f}{error} ({other['tool']}, {other['method']})"


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    typer.run(main)
