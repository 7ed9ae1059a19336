"""Greedy decoding of a whole model from its packed folder against the float model in BF16, and the memory of both.

    python benchmarks/decode.py FOLDER

FOLDER is a microbat folder; its recipe says where the float model is, or --reference does.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from timing import best_times

import microbat
from microbat.runtime.packed import PackedLinear


def main(
    folder: Path,
    reference: Annotated[str, typer.Option(help="The float model: a folder or a name on the hub.")] = "",
    tokens: int = 32,
    prompt: int = 16,
    rounds: int = 5,
    threads: int = 1,
) -> dict[str, float]:
    """Time ``tokens`` new tokens after a ``prompt`` of so many; print and return speed and memory as ratios to BF16."""
    torch.set_num_threads(threads)
    reference = reference or json.loads((folder / "recipe.json").read_text())["recipe"]["model"]
    floats = microbat.load(reference, dtype=torch.bfloat16)
    packed = microbat.load(folder, dtype=torch.bfloat16)
    ids = torch.randint(10, 200, (1, prompt), generator=torch.Generator().manual_seed(0))
    options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def decode(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    times = best_times({"BF16": lambda: decode(floats), "packed": lambda: decode(packed)}, rounds=rounds)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    bits = sum(layer.nbytes for layer in layers.values())
    online = sum(
        t.nbytes for layer in layers.values() for t in layer.site.state_dict().values() if layer is first(layer, layers)
    )
    halves = sum(2 * layer.in_features * layer.out_features for layer in layers.values())
    ratios = {"speed": times["BF16"] / times["packed"], "memory": (bits + online) / halves}
    print(f"{folder}: {tokens} tokens after {prompt}, {threads} threads, torch {torch.__version__}")
    for name, seconds in times.items():
        print(f"{name}: {tokens / seconds:.2f} tokens/s")
    print(f"packed against BF16: {ratios['speed']:.2f} times the tokens/s")
    print(
        f"linear layers: {bits / 1e6:.1f} MB of codes and scales and {online / 1e6:.2f} MB of transforms and clips, "
        f"{ratios['memory']:.3f} of BF16's {halves / 1e6:.1f} MB"
    )
    return ratios


def first(layer: PackedLinear, layers: dict[str, PackedLinear]) -> PackedLinear:
    """The first layer that shares this one's input."""
    return next(other for other in layers.values() if other.site is layer.site)


if __name__ == "__main__":
    typer.run(main)
