"""The tiny vision-language model's pictures, read back from their pixels, and its training script, run for two steps."""

import json
import random
from itertools import pairwise

import pytest
import torch

Image = pytest.importorskip("PIL.Image")
from blind_scenes import COLOURS, TASKS, scene  # noqa: E402

SCENES = 25


def drawn(task: str) -> list:
    return [scene("test", number, task) for number in range(SCENES)]


def parts(image, ink: bool) -> int:
    """How many connected parts the ink has, or the paper."""
    pixels = image.load()
    todo = {(x, y) for x in range(image.width) for y in range(image.height) if (min(pixels[x, y]) < 200) == ink}
    found = 0
    while todo:
        found, near = found + 1, [todo.pop()]
        while near:
            x, y = near.pop()
            around = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & todo
            todo -= around
            near += around
    return found


def answers(drawing) -> list[int]:
    return [int(answer) for _, answer in drawing.questions]


def test_equal_arguments_draw_equal_pictures():
    random.seed(1)
    state = random.getstate()
    first, again, other = scene("a", 3), scene("a", 3), scene("b", 3)
    assert (first.image.tobytes(), first.questions) == (again.image.tobytes(), again.questions)
    assert first.image.tobytes() != other.image.tobytes()
    assert random.getstate() == state
    assert {scene("a", number).task for number in range(60)} == set(TASKS)


def test_lines_cross_where_their_order_changes():
    for drawing in drawn("crossing_lines"):
        above = []
        for x in range(drawing.image.width):
            column = [drawing.image.getpixel((x, y)) for y in range(drawing.image.height)]
            red, blue = (
                [y for y, pixel in enumerate(column) if pixel == COLOURS[colour]] for colour in ("red", "blue")
            )
            if red and blue:
                above.append(sum(red) / len(red) < sum(blue) / len(blue))
        assert answers(drawing) == [sum(left != right for left, right in pairwise(above))]


def test_circles_overlap_where_their_ink_is_one():
    said = [drawing.questions[0][1] for drawing in drawn("touching_circles")]
    assert said == ["yes" if parts(drawing.image, ink=True) == 1 else "no" for drawing in drawn("touching_circles")]
    assert {"yes", "no"} == set(said)


def test_shapes_are_as_many_as_said():
    for drawing in drawn("counting"):
        assert sum(answers(drawing)) == parts(drawing.image, ink=True)


def test_shapes_have_the_colours_that_are_said():
    for drawing in drawn("colours"):
        found = {colour for colour, rgb in COLOURS.items() if rgb in set(drawing.image.get_flattened_data())}
        assert found == {answer for _, answer in drawing.questions}


def test_a_grid_has_as_many_cells_as_rows_times_columns():
    for drawing in drawn("grids"):
        rows, columns = answers(drawing)
        assert parts(drawing.image, ink=False) == rows * columns + 1


def test_squares_are_nested_as_deep_as_said():
    for drawing in drawn("nested_squares"):
        assert [parts(drawing.image, ink=False)] == [answers(drawing)[0] + 1]


def test_words_are_one_to_three_letters_apart():
    lengths = set()
    for drawing in drawn("words"):
        ((_, word),) = drawing.questions
        assert parts(drawing.image, ink=True) == len(word)
        lengths.add(len(word))
    assert lengths == {1, 2, 3}


def test_outlier_channels_change_activations_and_not_the_function():
    import train_tiny_vlm
    from outlier_channels import grow

    tokenizer = train_tiny_vlm.make_tokenizer()
    conversations = train_tiny_vlm.Conversations(tokenizer, train_tiny_vlm.make_image_processor())
    inputs = conversations(drawn("colours")[:3])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = train_tiny_vlm.make_model(tokenizer).eval()
    peaks = {}
    layers = (
        "language_model.layers.1.mlp.down_proj",
        "language_model.layers.2.mlp.up_proj",
        "visual.blocks.1.attn.qkv",
    )

    def logits():
        hooks = [
            model.model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: peaks.update({name: float(args[0].abs().max() / args[0].std())})
            )
            for name in layers
        ]
        with torch.no_grad():
            found = model(**inputs).logits
        for hook in hooks:
            hook.remove()
        return found

    before, calm = logits(), dict(peaks)
    grow(model, 0)
    after = logits()
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert all(peaks[name] > 1.5 * calm[name] for name in layers), (calm, peaks)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_the_script_trains_a_model_that_loads_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch, capsys):
    import train_tiny_vlm
    from transformers import AutoModelForImageTextToText

    from microbat.evaluation.benchmarks import BENCHMARKS
    from microbat.evaluation.generation import OnTheSpot, Sampling
    from microbat.evaluation.problems import load_problems
    from microbat.evaluation.sampled import run_sampled
    from microbat.models.processor import Processor

    monkeypatch.setattr(train_tiny_vlm, "PICTURES", {"calibration": 2, "held-out": 3})
    monkeypatch.setattr(train_tiny_vlm, "CHECKPOINT_STEPS", 1)
    with torch.random.fork_rng():
        train_tiny_vlm.main([str(tmp_path), "--steps", "1", "--batch", "2"])
        first = (tmp_path / "model" / "model.safetensors").read_bytes()
        train_tiny_vlm.main([str(tmp_path), "--steps", "2", "--batch", "2"])
    assert "step 1" in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != first
    assert len(first) < 5_000_000
    lines = (tmp_path / "calibration" / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == [*TASKS, *TASKS]

    problems = load_problems(BENCHMARKS["tiny_vlm"], tmp_path)
    assert len(problems) == 3 * len(TASKS)
    model, processor = AutoModelForImageTextToText.from_pretrained(tmp_path / "model"), Processor(tmp_path / "model")
    sampling = Sampling(temperature=0, max_new_tokens=2, batch_size=21)
    generate = OnTheSpot(model=model, tokenizer=processor.tokenizer, sampling=sampling, processor=processor)
    arguments = (problems, generate, sampling, "m", tmp_path / "answers.jsonl")
    result = run_sampled(BENCHMARKS["tiny_vlm"], *arguments, progress=False)
    assert result["n"] == 21
    assert set(result["by_task"]) == set(TASKS)
