"""A real model to 4 bits and back: quantize with RTN and BATQuant, compare with float, generate, write the report.

``MODEL=path-or-hub-id`` takes another model. What is there already is not made again: an interrupted demo goes on.
"""

import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from smollm2 import smollm2

import microbat
from microbat.pipeline import tokenizer_of

OUT = Path("microbat-demo")
PROMPT = "The capital of France is"


def main() -> None:
    console, started = Console(), time.perf_counter()
    model_name = os.environ.get("MODEL") or str(smollm2())
    place, folders = OUT / Path(model_name).name, {}
    # RTN learns nothing: a little text tells its errors.
    runs = {
        "rtn": {"num_calibration_samples": 4, "max_seq_length": 64},
        "batquant": {"solver": "gptq", "num_calibration_samples": 16},
    }
    for method, fields in runs.items():
        folders[method] = place / method
        if not folders[method].exists():
            microbat.quantize(model_name, out=folders[method], method=method, **fields)
    result = microbat.evaluate({"float": model_name, **folders}, windows=8)
    page = microbat.write_report(folders["batquant"], result)

    table = Table(title=f"MXFP4 W4A4KV16, {result['text']}, {result['windows']} windows of {result['window']} tokens")
    for column in ("model", "perplexity", "times float", "KL to float", "top-1 agreement"):
        table.add_column(column)
    for row in result["rows"]:
        cells = (f"{row['perplexity']:.2f}", f"{row['ratio']:.3f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}")
        table.add_row(row["name"], *cells)
    console.print(table)

    model, tokenizer = microbat.load(folders["batquant"]), tokenizer_of(folders["batquant"])
    prompt = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    console.print(f"[bold]{tokenizer.decode(output[0], skip_special_tokens=True)}[/]", highlight=False)
    console.print(f"report: {page.resolve()}  ({(time.perf_counter() - started) / 60:.1f} minutes)", soft_wrap=True)


if __name__ == "__main__":
    main()
