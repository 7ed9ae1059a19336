"""Mixtures of experts through every room: what is covered, what the folder holds and computes, interrupted runs, who refuses."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import microbat
from microbat import pipeline
from microbat.bench import bench
from microbat.calibrate.coverage import coverage
from microbat.cli import app
from microbat.export import compressed_tensors, gguf
from microbat.export import folder as folders
from microbat.export import shard as shards
from microbat.formats.packing import pack
from microbat.models.base import DECODER_SITES
from microbat.models.checkpoint import Checkpoint
from microbat.runtime.load import load_dequantized
from microbat.scheme import Scheme
from microbat.unfinished import FolderKeeper
from microbat.verify import Altered, verify

FAST = {"num_calibration_samples": 8, "max_seq_length": 32, "precision": "float32"}
EXPERTS = {"qwen3_moe": (5, 32), "mixtral": (3, 96)}  # how many, and their inner width
TOKENS = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(5))
CASES = [
    ("qwen3_moe", "rtn", "W8A8", {}),
    ("mixtral", "gptq", "W4A4:nvfp4", {}),
    ("qwen3_moe", "batquant", "W4A4KV4", {"epochs": 1}),
    ("mixtral", "flatquant", "W4A4", {"epochs": 1}),
    ("mixtral", "soar", "W4A4:nvfp4", {}),
    ("qwen3_moe", "micromix", "W4A4", {"unit": 32}),
]
IDS = [f"{family}-{method}" for family, method, *_ in CASES]


@pytest.fixture(scope="module")
def made(tiny, text_file, tmp_path_factory):
    """Folders by family, method and scheme, made once, with what calibration gave to each block."""
    done = {}

    def get(family, method, scheme, settings, **options):
        key = (family, method, scheme, *options)
        if key not in done:
            seen, save = {}, FolderKeeper.save

            def keep(self, index, block, module, record):
                seen[index] = {path: q.dequantize() for path, q in block.weights.items()}
                save(self, index, block, module, record)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FolderKeeper, "save", keep)
                out = tmp_path_factory.mktemp(family) / "q"
                options = {"scheme": scheme, "settings": settings, "calibration": str(text_file), **FAST, **options}
                done[key] = microbat.quantize(tiny(family), out=out, method=method, **options), seen
        return done[key]

    return get


@pytest.mark.parametrize(("family", "method", "scheme", "settings"), CASES, ids=IDS)
def test_the_folder_computes_what_calibration_saw(made, family, method, scheme, settings):
    folder, seen = made(family, method, scheme, settings)
    packed, floats = microbat.load(folder), load_dequantized(folder)
    for index, weights in seen.items():
        assert len(weights) == 7
        for path, weight in weights.items():
            name = f"model.layers.{index}.{path}"
            assert torch.equal(packed.get_submodule(name).dequantize(), weight)
            assert torch.equal(floats.get_submodule(name).weight, weight)
    verdict = verify(folder)
    assert verdict.passed
    assert (verdict.layers, verdict.error <= 1e-6) == (14, True)


@pytest.mark.parametrize(("family", "method", "scheme", "settings"), CASES[:2], ids=IDS[:2])
def test_every_expert_is_stored_on_its_own(made, family, method, scheme, settings):
    folder, _ = made(family, method, scheme, settings)
    shard = folder / folders.block_shard(1)
    stored = shards.read_block(shard).quantized.weights
    number, inner = EXPERTS[family]
    with safe_open(shard, framework="pt") as file:
        for layer, shape in (("gate_proj", (inner, 64)), ("up_proj", (inner, 64)), ("down_proj", (64, inner))):
            for expert, one in enumerate(stored[f"mlp.experts.{layer}"].unstack()):
                assert tuple(one.shape) == shape
                for key, tensor in pack(one).items():
                    found = file.get_tensor(f"model.layers.1.mlp.experts.{expert}.{layer}.{key}")
                    assert found.dtype == tensor.dtype
                    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
            assert expert == number - 1
        assert file.get_tensor("model.layers.1.mlp.gate.weight").dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "method", "scheme", "settings", "ignore"),
    [
        (*CASES[0], ()),
        (*CASES[2], ()),
        ("qwen3_moe", "quarot", "W8A8", {}, ("re:experts",)),
        ("mixtral", "rtn", "W4A8", {}, ("re:experts.down_proj$",)),
    ],
)
def test_transformers_runs_the_same(made, family, method, scheme, settings, ignore):
    folder, _ = made(family, method, scheme, settings, **({"ignore": ignore} if ignore else {}))
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(theirs(TOKENS).logits, microbat.load(folder)(TOKENS).logits)


def test_a_run_that_stopped_goes_on(tiny, text_file, tmp_path, monkeypatch):
    options = {"method": "batquant", "solver": "gptq", "settings": {"epochs": 1, "refine_epochs": 1}}
    options |= {"calibration": str(text_file), **FAST}
    one = microbat.quantize(tiny("qwen3_moe"), out=tmp_path / "one", **options)
    save = FolderKeeper.save

    def stopped(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(FolderKeeper, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            microbat.quantize(tiny("qwen3_moe"), out=tmp_path / "two", **options)
    two = microbat.quantize(tiny("qwen3_moe"), out=tmp_path / "two", **options)
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name
    tokens = [[b["expert_tokens"] for b in json.loads((d / "report.json").read_text())["blocks"]] for d in (one, two)]
    assert tokens[0] == tokens[1]


def test_what_is_covered(tiny):
    rows = {row.layer: row for row in coverage(Checkpoint(tiny("mixtral")), Scheme.parse("W4A8"))}
    experts = {name: row for name, row in rows.items() if ".experts." in name}
    assert {row.shape for row in experts.values()} == {(3, 96, 64), (3, 64, 96)}
    assert len(experts) == 6
    assert all((row.weights, row.activations) == ("mxfp4", "mxfp8_e4m3") for row in experts.values())
    router = rows["model.layers.0.mlp.gate.weight"]
    assert (router.weights, router.reason, router.surprise) == (None, "the router stays in float", False)
    assert not any(row.surprise for row in rows.values())


def test_strict_stops_at_experts_that_would_be_skipped(tiny, text_file, tmp_path, monkeypatch):
    """A family that does not know of them, and a pattern for one expert alone."""

    def run(*arguments):
        command = ["quantize", str(tiny("qwen3_moe")), "--out", str(tmp_path / "q"), "--method", "rtn", "--strict"]
        result = CliRunner().invoke(app, [*command, "--calibration", str(text_file), *arguments])
        assert result.exit_code == 2, result.output
        assert not (tmp_path / "q").exists()
        return re.sub(r"\s+", " ", result.output)

    assert "--ignore matches no layer" in run("--ignore", "re:experts.3.gate_proj")
    family = dataclasses.replace(Checkpoint(tiny("qwen3_moe")).family, sites=DECODER_SITES, experts="", layouts=())
    monkeypatch.setattr(Checkpoint, "family", family)
    assert "--strict: model.layers.0.mlp.experts.gate_up_proj: family 'qwen3_moe' does not know it" in run()


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("gptaq", {}, "gptaq cannot round experts: it needs their deviation. Choose gptq, or leave them in float"),
        ("pt2llm", {}, "pt2llm takes channels in an order of its own, and experts share one activation"),
        ("d2quant", {}, "d2quant's dual-scale quantizer and its correction are not made for experts"),
        ("d2quant", {"dual": False, "correct": False}, "gptaq cannot round experts"),
    ],
)
def test_what_means_nothing_to_experts_is_refused_before_any_work(tiny, method, settings, said):
    scheme = "W2A16:ternary_g64" if method == "pt2llm" else "W2A16:int2_g64"
    recipe = microbat.Recipe(
        model=str(tiny("qwen3_moe", moe_intermediate_size=64)), method=method, scheme=scheme, settings=settings
    )
    with pytest.raises(ValueError, match=f"layer 'model.layers.0.mlp.experts.gate_proj': {re.escape(said)}"):
        pipeline.check(recipe)
    recipe = dataclasses.replace(recipe, ignore=("re:experts",))
    pipeline.check(recipe)


def test_an_altered_expert_is_named(made, tmp_path):
    folder, _ = made(*CASES[0])
    copy = shutil.copytree(folder, tmp_path / "q")
    shard = copy / folders.block_shard(0)
    content = bytearray(shard.read_bytes())
    with safe_open(shard, framework="pt") as file:
        name = "model.layers.0.mlp.experts.4.up_proj.weight"
        wanted = bytes(file.get_tensor(name).view(torch.uint8).numpy())
    content[content.index(wanted) + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Altered, match=re.escape(f"tensor {name} was altered")):
        verify(copy)


def test_engines_that_do_not_compute_them_refuse(made, tmp_path):
    folder, _ = made("mixtral", "rtn", "W4A16", {})
    for export, target in ((compressed_tensors.export, "vllm-hopper"), (gguf.export, "llama.cpp")):
        with pytest.raises(ValueError, match=r"experts: .* has not been verified .* keep the microbat folder"):
            export(folder, tmp_path / "x", target=target)
        assert not (tmp_path / "x").exists()


def test_bench_counts_all_experts(made):
    folder, _ = made(*CASES[0])
    result = bench(folder, device=torch.device("cpu"), tokens=2, prompt=3, rounds=1)
    weights = 2 * (2 * 128 * 64 + 2 * 64 * 64 + 3 * 5 * 32 * 64)
    assert (result.packed.weights, result.bf16.weights) == (weights * 8.25 / 8, weights * 2)


def test_a_float_producer_takes_the_scale_of_what_it_makes(tiny, text_file, tmp_path):
    """FlatQuant's factors of down's input go into the rows of up, whether up is quantized or not."""
    options = {"settings": {"epochs": 1}, "calibration": str(text_file), "ignore": ("re:up_proj$",), **FAST}
    out = microbat.quantize(tiny("mixtral"), out=tmp_path / "q", method="flatquant", **options)
    assert verify(out).passed
