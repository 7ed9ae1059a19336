"""Vision-language models, the whole way: calibration on images, the folder, what runs from it; what is refused."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import microbat
from microbat import pipeline
from microbat.calibrate.coverage import coverage
from microbat.calibrate.engine import calibrate
from microbat.calibrate.job import Job
from microbat.calibrate.pairs import samples
from microbat.cli import app
from microbat.engines.base import engines
from microbat.export import compressed_tensors
from microbat.export import folder as folders
from microbat.formats.microscaling import MXFP4
from microbat.methods.base import Preparer
from microbat.methods.rtn import RTN
from microbat.models.checkpoint import Checkpoint
from microbat.models.padding import padded
from microbat.quantizers.base import AbsMax
from microbat.recipe import Recipe
from microbat.runtime.experts import PackedExperts
from microbat.runtime.load import load_dequantized
from microbat.runtime.packed import PackedLinear
from microbat.scheme import Scheme
from microbat.verify import Altered, verify

Image = pytest.importorskip("PIL.Image")
FAST = {"num_calibration_samples": 4, "max_seq_length": 128, "precision": "float32"}
TOWER = "re:^model.visual.blocks"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Six images of several sizes with questions; some lines say ``prompt``, or have no answer."""
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(2)
    lines = []
    for index in range(6):
        pixels = torch.randint(256, (16 + 4 * index, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
        line = {"image": f"{index}.png", "prompt" if index == 1 else "question": f"What is {index}?"}
        lines.append(json.dumps(line if index == 2 else {**line, "answer": str(index)}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def quantized(tiny, images, tmp_path_factory):
    """``quantized(family)``: a folder with all that can be online, made once."""
    made = {}

    def get(family: str) -> Path:
        if family not in made:
            options = {
                "scheme": "W4A4KV4",
                "settings": {"epochs": 1, "refine_epochs": 1, "distill_epochs": 1},
                "solver": "gptq",
            }
            out = tmp_path_factory.mktemp(family) / "q"
            made[family] = microbat.quantize(tiny(family), out=out, calibration=str(images), **options, **FAST)
        return made[family]

    return get


class Watching(Preparer):
    """Does nothing, and keeps what every block was given in the float stream, sample by sample."""

    name, summary = "watching", ""

    def __init__(self):
        self.seen = {}

    def prepare(self, data, plan, solver):
        streams = (data.float_inputs, data.targets, data.inputs)
        self.seen[data.index] = [[stream[torch.tensor([row])] for row in range(len(stream))] for stream in streams]
        return plan


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl"])
def test_blocks_are_given_what_the_model_gives_them(tiny, pairs, family, tmp_path):
    """DeepStack, windows, scattered features, positions: the oracle is the float model, its blocks watched."""
    checkpoint = Checkpoint(tiny(family))
    model = padded(checkpoint, checkpoint.family.stacks, 32)
    watching = Watching()

    class Keeper:
        def has(self, index):
            return False

        def save(self, *args):
            pass

        def finish(self, sample, outputs):
            self.finished = sample, outputs

    job = Job(
        checkpoint=model,
        scheme=Scheme.parse("W8A16", ignore=("re:.",)),
        preparers=(watching,),
        solver=RTN(),
        tokens=torch.zeros(0, 0, dtype=torch.int64),
        pairs=pairs,
        seed=0,
        precision="float32",
        device=torch.device("cpu"),
        scratch=tmp_path,
    )
    keeper = Keeper()
    list(calibrate(job, keeper, lambda *a: {}, lambda *a: None))
    oracle, caught = pipeline.load(checkpoint.path), []
    for _, name in checkpoint.blocks:
        block = oracle.get_submodule(name)
        block.register_forward_hook(lambda module, inputs, output: caught.append((inputs[0], output)))
    assert len(watching.seen) == 6
    for row, sample in enumerate(pairs):
        caught.clear()
        with torch.no_grad():
            oracle(**sample)
        for index, (given, gave) in enumerate(caught):
            inputs, targets, quantized = (stream[row] for stream in watching.seen[index])
            width = inputs.shape[-1]
            torch.testing.assert_close(inputs, given.reshape(-1, width), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(targets, gave.reshape(-1, width), rtol=1e-4, atol=1e-4)
            assert torch.equal(inputs, quantized)  # nothing is quantized here
    assert keeper.finished[0] is pairs[0]
    assert keeper.finished[1].shape == (1, pairs[0]["input_ids"].shape[1], 128)


@pytest.mark.parametrize(
    ("family", "layers", "width"), [("qwen3_vl", 33, 128), ("qwen3_vl_moe", 33, 128), ("qwen2_5_vl", 36, 128)]
)
def test_the_whole_way(quantized, pairs, family, layers, width):
    out = quantized(family)
    assert json.loads((out / "config.json").read_text())["vision_config"]["intermediate_size"] == width
    assert (out / "preprocessor_config.json").is_file()
    verdict = verify(out)
    assert verdict.passed, verdict
    assert verdict.layers == layers
    assert verdict.divergence < 1e-5  # microbat's own runtime, in float32, on the images of the proof
    model = microbat.load(out)
    named = [name for name, module in model.named_modules() if isinstance(module, PackedLinear | PackedExperts)]
    packed = [name for name in named if ".groups." not in name]  # an expert's own layer
    assert len(packed) == layers
    assert sum("visual" in name for name in packed) == layers - 21
    exact = load_dequantized(out)
    theirs = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    for sample in pairs:
        with torch.no_grad():
            logits = model(**sample).logits
            torch.testing.assert_close(logits, exact(**sample).logits, rtol=1e-3, atol=1e-3)
            assert torch.equal(logits, theirs(**sample).logits)
    answers = [
        m.generate(**pairs[2], max_new_tokens=5, do_sample=False, past_key_values=cache)
        for m, cache in ((model, microbat.QuantizedCache(model)), (theirs, None))
    ]
    assert torch.equal(*answers)
    assert answers[0].shape[1] == pairs[2]["input_ids"].shape[1] + 5
    assert isinstance(pipeline.generate(out, "Without an image", max_new_tokens=3, device="cpu"), str)


def test_mergers_on_request(tiny, images, pairs, tmp_path):
    """The language model was calibrated on what they make: its last block's outputs in the proof are those of the folder."""
    options = {"method": "gptq", "scheme": "W4A8", "calibration": str(images), **FAST}
    out = microbat.quantize(tiny("qwen3_vl"), out=tmp_path / "q", also=("re:merger",), **options)
    layers = [entry["name"] for entry in json.loads((out / "report.json").read_text())["outside"]]
    assert len(layers) == 6
    verdict = verify(out)
    assert verdict.passed, verdict
    assert verdict.layers == 33 + 6
    assert verdict.divergence < 1e-5
    model, theirs = microbat.load(out), AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert isinstance(model.model.visual.merger.linear_fc1, PackedLinear)
    with torch.no_grad():
        assert torch.equal(model(**pairs[1]).logits, theirs(**pairs[1]).logits)


def test_an_image_changes_what_is_said(quantized, pairs):
    model = microbat.load(quantized("qwen3_vl"))
    other = {**pairs[0], "pixel_values": -pairs[0]["pixel_values"]}
    with torch.no_grad():
        assert (model(**pairs[0]).logits[0, -1] - model(**other).logits[0, -1]).abs().max() > 1e-2


def test_an_altered_layer_of_the_tower_is_named(quantized, tmp_path):
    copy = shutil.copytree(quantized("qwen3_vl"), tmp_path / "q")
    shard = copy / folders.block_shard(1)
    with safe_open(shard, framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["model.visual.blocks.1.attn.qkv.weight_packed"][0, 0] ^= 1
    save_file(tensors, shard, metadata)
    with pytest.raises(Altered, match=r"model\.visual\.blocks\.1\.attn\.qkv\.weight_packed was altered"):
        verify(copy)


@pytest.mark.parametrize("name", ["vllm", "llama.cpp"])
def test_engines_that_were_not_tried_with_images_say_so(name, pairs):
    images = {"pixel_values": pairs[0]["pixel_values"]}
    with pytest.raises(
        ValueError, match=f"{name} was not tried with images; verify this folder with --engine microbat"
    ):
        engines()[name]().run(Path(), pairs[0]["input_ids"][0], [], images)


@pytest.mark.parametrize(("family", "block"), [("qwen3_vl", 1), ("qwen3_vl_moe", 4)])
def test_an_interrupted_run_goes_on(tiny, images, tmp_path, monkeypatch, family, block):
    """In the tower; in the language model, where experts are."""
    options = {"method": "gptq", "calibration": str(images), **FAST}
    whole = microbat.quantize(tiny(family), out=tmp_path / "whole", **options)
    original = pipeline.calibrate

    def interrupted(*args):
        for number, record in enumerate(original(*args)):
            yield record
            if number == block:
                raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        microbat.quantize(tiny(family), out=tmp_path / "again", **options)
    monkeypatch.setattr(pipeline, "calibrate", original)
    again = microbat.quantize(tiny(family), out=tmp_path / "again", **options)
    assert digests(again) == digests(whole)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def test_text_alone_calibrates_the_language_model(tiny, text_file, tmp_path):
    options = {"method": "gptq", "calibration": str(text_file), **FAST, "max_seq_length": 32}
    with pytest.raises(
        ValueError, match=r"does not reach model\.visual\.blocks: give --calibration a folder of images"
    ):
        microbat.quantize(tiny("qwen3_vl"), out=tmp_path / "q", **options)
    out = microbat.quantize(tiny("qwen3_vl"), out=tmp_path / "q", ignore=(TOWER,), **options)
    verdict = verify(out)
    assert verdict.passed
    assert verdict.layers == 21
    original, model = pipeline.load(tiny("qwen3_vl")), microbat.load(out)
    for (name, theirs), ours in zip(
        original.model.visual.named_parameters(), model.model.visual.parameters(), strict=True
    ):
        assert torch.equal(theirs, ours), name
    measured = microbat.evaluate({"q": out}, text=str(text_file), window=32, windows=2)
    assert [row["name"] for row in measured["rows"]] == ["float", "q"]


def test_coverage_knows_the_tower(tiny):
    checkpoint = Checkpoint(tiny("qwen3_vl"))
    rows = {row.layer: row for row in coverage(padded(checkpoint, checkpoint.family.stacks, 32), Scheme.parse("W4A4"))}
    assert not any(row.surprise for row in rows.values())
    assert sum(row.weights == "mxfp4" for row in rows.values()) == 33
    assert rows["model.visual.blocks.2.mlp.linear_fc2"].shape == (64, 128)
    assert "outside the blocks" in rows["model.visual.deepstack_merger_list.1.linear_fc1"].reason
    assert "outside the blocks" in rows["model.visual.patch_embed.proj.weight"].reason


def test_coverage_knows_the_experts(tiny):
    checkpoint = Checkpoint(tiny("qwen3_vl_moe"))
    rows = {row.layer: row for row in coverage(padded(checkpoint, checkpoint.family.stacks, 32), Scheme.parse("W4A4"))}
    assert not any(row.surprise for row in rows.values())
    assert sum(row.weights == "mxfp4" for row in rows.values()) == 33
    experts = {row.shape for name, row in rows.items() if ".experts." in name and row.weights == "mxfp4"}
    assert experts == {(5, 96, 128), (5, 128, 96)}
    assert rows["model.language_model.layers.0.mlp.gate.weight"].reason == "the router stays in float"


def test_images_that_cannot_be_read(tiny, images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:90])
    (folder / "4.png").write_text("no image")
    options = {"scheme": "W8A16", "method": "rtn", "calibration": str(folder), **FAST}
    out = microbat.quantize(tiny("qwen3_vl"), out=tmp_path / "q", skip_bad=True, **options)
    left = json.loads((out / "report.json").read_text())["recipe"]["calibration_skipped"]
    assert left
    assert all("the picture cannot be read" in reason for reason in left)
    options["num_calibration_samples"] = 5
    with pytest.raises(ValueError, match=r"pairs\.jsonl:[45] \([34]\.png\): the picture cannot be read.*--skip-bad"):
        microbat.quantize(tiny("qwen3_vl"), out=tmp_path / "r", **options)
    with pytest.raises(ValueError, match="has 6 pairs, 2 of them unreadable; 5 are asked for"):
        microbat.quantize(tiny("qwen3_vl"), out=tmp_path / "s", skip_bad=True, **options)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("jsonl", "must hold one .jsonl file, a line a pair; it holds none"),
        ("line", "pairs.jsonl:2 is not a pair with image, question"),
        ("length", "tokens for an image that takes"),
        ("token", "places for images"),
        ("processor", "has no preprocessor_config.json: the model's image processor is missing"),
    ],
)
def test_bad_pairs(tiny, images, tmp_path, spoil, said):
    folder, model = shutil.copytree(images, tmp_path / "images"), tiny("qwen3_vl")
    options = {"method": "rtn", "calibration": str(folder), **FAST}
    file = folder / "pairs.jsonl"
    if spoil == "jsonl":
        file.unlink()
    elif spoil == "line":
        file.write_text('{"image": "0.png", "question": "?"}\n{"image": "1.png"}\n')
    elif spoil == "length":
        options["max_seq_length"] = 10
    elif spoil == "token":
        file.write_text('{"image": "0.png", "question": "what is <|image_pad|>?"}\n')
    else:
        model = shutil.copytree(model, tmp_path / "model")
        (model / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=said):
        microbat.quantize(model, out=tmp_path / "q", **options)


def test_gqa_by_name(tiny, images, monkeypatch):
    """The hub's data set as it would come: encoded images in one table, questions with the images' names in another."""
    datasets = pytest.importorskip("datasets")

    class Rows(list):
        def cast_column(self, *arguments):
            return self

    tables = {
        "train_balanced_images": [
            {"id": str(i), "image": {"bytes": (images / f"{i}.png").read_bytes(), "path": None}} for i in range(3)
        ],
        "train_balanced_instructions": [
            {"imageId": str(i), "question": f"What is {i}?", "answer": "x", "fullAnswer": f"It is {i}."} for i in (2, 0)
        ],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, **options: Rows(tables[subset]))
    checkpoint = Checkpoint(tiny("qwen3_vl"))
    made, skipped = samples("gqa", checkpoint, 2, 128, torch.Generator(), skip_bad=False)
    assert skipped == ()
    said = [pipeline.tokenizer_of(checkpoint.path).decode(sample["input_ids"][0]) for sample in made]
    assert [text.partition("<|vision_end|>")[2] for text in said] == [
        "What is 0? assistant: It is 0. ",
        "What is 2? assistant: It is 2. ",
    ]
    with pytest.raises(ValueError, match="'gqa' has 2 pairs; 3 are asked for"):
        samples("gqa", checkpoint, 3, 128, torch.Generator(), skip_bad=False)


@pytest.fixture
def answered(tiny, images, tmp_path) -> tuple[Path, Path]:
    """A model whose template ends an answer by a token, and goes on after it; a folder in which every question has one."""
    model, folder = (
        shutil.copytree(source, tmp_path / name) for source, name in ((tiny("qwen3_vl"), "m"), (images, "p"))
    )
    template = model / "chat_template.jinja"
    ended = "{{ message.content }}<|endoftext|>{{ 'what was' }}"
    assert (whole := template.read_text()).count("{{ message.content }}") == 1
    template.write_text(whole.replace("{{ message.content }}", ended))
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps({"answer": "it is", **line}) for line in lines))
    return model, folder


def test_measured_on_answers(answered, tmp_path):
    """Against transformers' own loss of the answers' tokens and the one that ends them; then the commands."""
    model, folder = answered
    processor, loaded = pipeline.processor_of(model), pipeline.load(model)
    losses, counts = [], []
    for line in map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()):
        image = Image.open(folder / line["image"]).convert("RGB")
        whole = processor("", image, line.get("question") or line["prompt"], line["answer"])
        ids = processor.tokenizer(line["answer"] + "<|endoftext|>", add_special_tokens=False)["input_ids"]
        end = whole["input_ids"][0].tolist().index(ids[-1]) + 1
        labels = torch.full_like(whole["input_ids"], -100)
        labels[0, end - len(ids) : end] = torch.tensor(ids)
        assert torch.equal(labels[0, end - len(ids) : end], whole["input_ids"][0, end - len(ids) : end])
        with torch.no_grad():
            losses.append(loaded(**whole, labels=labels).loss.item() * len(ids))
        counts.append(len(ids))
    assert len(set(counts)) > 1
    out = microbat.quantize(model, out=tmp_path / "q", scheme="W4A4", method="rtn", calibration=str(folder), **FAST)
    result = microbat.evaluate({"q": out}, text=str(folder), windows=16)
    assert (result["text"], result["windows"], result["window"], result["tokens"]) == ("p", 6, None, sum(counts))
    reference, row = result["rows"]
    assert reference["perplexity"] == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-4)
    assert row["kl"] > 1e-4
    shown = CliRunner().invoke(app, ["eval", str(out), "--text", str(folder), "--windows", "3"])
    assert shown.exit_code == 0, shown.output
    assert "p: 3 answers" in shown.output
    assert "3 answers, " in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("answer", r"pairs.jsonl:1 \(0.png\) has no answer"),
        ("image", r"pairs.jsonl:2 \(1.png\): the picture cannot be read"),
        ("model", "cannot be asked about pictures"),
    ],
)
def test_what_cannot_be_measured_on_answers(tiny, images, tmp_path, spoil, said):
    folder, model = shutil.copytree(images, tmp_path / "images"), tiny("llama" if spoil == "model" else "qwen3_vl")
    file = folder / "pairs.jsonl"
    if spoil == "answer":
        file.write_text('{"image": "0.png", "question": "?"}\n')
    else:
        file.write_text("\n".join(line for line in file.read_text().splitlines() if "answer" in line))
    if spoil == "image":
        (folder / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=said):
        microbat.evaluate({"float": model}, text=str(folder))


def test_images_for_a_model_without_eyes(tiny, images):
    with pytest.raises(ValueError, match="holds images, and family 'llama' takes none"):
        pipeline.check(Recipe(model=str(tiny()), calibration=str(images)))


@pytest.mark.parametrize(
    ("family", "layer"), [("qwen3_vl", "mlp.down_proj"), ("qwen3_vl_moe", "mlp.experts.down_proj")]
)
def test_the_command_line(tiny, images, tmp_path, family, layer):
    command = ["quantize", tiny(family), "--out", tmp_path / "q", "--method", "rtn", "--calibration", images]
    command += ["--num-calibration-samples", 3, "--max-seq-length", 128, "--strict"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    assert "model.visual.blocks.*.mlp.linear_fc2" in result.output
    assert f"model.language_model.layers.*.{layer}" in result.output
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "q")])
    assert result.exit_code == 0, result.output
    assert "visual" in result.output
    result = CliRunner().invoke(app, ["export", str(tmp_path / "q"), "--target", "vllm-plugin", "--out", "x"])
    assert result.exit_code == 2
    assert "vLLM with microbat's plugin was not tried with them" in result.output


def test_padding_changes_no_number(tiny):
    """Rows and columns of zeros: the padded model computes what the stored one does, and its fc2 quantizes whole blocks."""
    checkpoint = Checkpoint(tiny("qwen3_vl"))
    wide = padded(checkpoint, checkpoint.family.stacks, 32)
    layer = "model.visual.blocks.0.mlp.linear_fc2"
    stored, read = checkpoint.tensor(f"{layer}.weight"), wide.tensor(f"{layer}.weight")
    assert (stored.shape, read.shape) == ((64, 112), (64, 128))
    assert torch.equal(read[:, :112], stored)
    assert not read[:, 112:].any()
    assert wide.tensor("model.visual.blocks.0.mlp.linear_fc1.bias").shape == (128,)
    assert padded(checkpoint, checkpoint.family.stacks, 16) is checkpoint
    quantizer = AbsMax(format=MXFP4)
    assert torch.equal(quantizer.fake(read)[:, :112], quantizer.fake(stored))  # zeros move no scale


@pytest.mark.parametrize(("family", "ignore", "layers"), [("qwen3_vl", (), 33), ("qwen3_vl_moe", ("re:experts",), 24)])
def test_an_export_for_transformers(tiny, images, tmp_path, family, ignore, layers):
    """The layout of compressed-tensors, the tower's packed weights in it, run on the image of its proof; experts in float."""
    pytest.importorskip("compressed_tensors")
    options = {"method": "rtn", "scheme": "W4A16", "calibration": str(images), "ignore": ignore, **FAST}
    folder = microbat.quantize(tiny(family), out=tmp_path / "q", **options)
    out = compressed_tensors.export(folder, tmp_path / "ct", target="transformers")
    verdict = verify(out)
    assert verdict.passed, verdict
    assert verdict.layers == layers


def test_experts_that_a_checkpoint_holds_fused_have_no_export(quantized, tmp_path):
    with pytest.raises(
        ValueError, match="qwen3_vl_moe's checkpoints hold experts fused, for which compressed-tensors has"
    ):
        compressed_tensors.export(quantized("qwen3_vl_moe"), tmp_path / "ct", target="transformers")
