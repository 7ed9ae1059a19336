"""Suites: what a file asks for, and that whatever is wrong with it is refused at once, by name."""

from pathlib import Path

import pytest
import yaml

from microbat import pipeline
from microbat.evaluation.benchmarks import BENCHMARKS
from microbat.evaluation.generation import Sampling
from microbat.suite import Suite

ROOT = Path(__file__).resolve().parents[1]
GOOD = {
    "title": "tiny",
    "model": "some/model",
    "calibration": {"samples": 8, "length": 32},
    "schemes": ["W4A4KV16", "W4A8KV16"],
    "seeds": [3, 4],
    "rows": [
        {"label": "RTN", "method": "rtn"},
        {"label": "Hadamard", "method": "batquant", "settings": {"transform": "hadamard", "epochs": 0}},
        {"label": "BATQuant + GPTQ", "method": "batquant", "solver": "gptq", "num_calibration_samples": 6},
    ],
    "ablations": [
        {
            "title": "Sizes",
            "row": {"label": "BATQuant", "method": "batquant", "solver": "gptq", "settings": {"epochs": 1}},
            "vary": {"g": [16, 32], "g1": [4, 8]},
            "schemes": ["W4A4KV16"],
        }
    ],
    "quick": {"calibration": {"samples": 2}, "seeds": [3], "ablations": []},
}


def read(tmp_path, content, **options) -> Suite:
    file = tmp_path / "suite.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return Suite.read(file, **options)


def test_cells_are_rows_times_schemes_times_the_seeds_that_matter(tmp_path):
    cells = read(tmp_path, GOOD).cells()
    main = [cell.name for cell in cells if not cell.group]
    assert main == [
        "rtn-w4a4kv16-seed3",
        "hadamard-w4a4kv16-seed3",
        "batquant-gptq-w4a4kv16-seed3",
        "rtn-w4a8kv16-seed3",
        "hadamard-w4a8kv16-seed3",
        "batquant-gptq-w4a8kv16-seed3",
        "batquant-gptq-w4a4kv16-seed4",
        "batquant-gptq-w4a8kv16-seed4",
    ]
    recipe = next(cell.recipe for cell in cells if cell.label == "BATQuant + GPTQ")
    assert (recipe.model, recipe.num_calibration_samples, recipe.max_seq_length) == ("some/model", 6, 32)
    some = {"label": "GPTQ", "method": "gptq", "schemes": ["W4A8KV16"], "seeds": [4]}
    wider = read(tmp_path, GOOD | {"rows": [*GOOD["rows"], some]}).cells()
    assert [cell.name for cell in wider if cell.label == "GPTQ"] == ["gptq-w4a8kv16-seed4"]
    varied = [cell for cell in cells if cell.group == "Sizes"]
    assert len(varied) == 2 * 2 * 2
    assert varied[1].varied == {"g": 16, "g1": 8}
    assert varied[1].recipe.settings == {"epochs": 1, "g": 16, "g1": 8}
    assert varied[1].name == "sizes-g=16-g1=8-w4a4kv16-seed3"


def test_the_quick_form_replaces_entries_of_sections_and_whole_lists(tmp_path):
    suite = read(tmp_path, GOOD, quick=True)
    assert (suite.calibration.samples, suite.calibration.length) == (2, 32)
    assert (suite.seeds, suite.ablations, len(suite.cells())) == ((3,), (), 6)


def test_model_calibration_and_text_can_be_given_from_outside(tmp_path):
    suite = read(
        tmp_path,
        {**GOOD, "evaluation": {"windows": 3}},
        model="other/model",
        calibration="c.txt",
        text="words.txt",
        quick=True,
    )
    assert {cell.recipe.model for cell in suite.cells()} == {"other/model"}
    assert {cell.recipe.calibration for cell in suite.cells()} == {"c.txt"}
    assert (suite.evaluation.text, suite.evaluation.windows) == ("words.txt", 3)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "suites").glob("*.yaml")))
def test_the_suites_that_come_along_are_good(name):
    path = ROOT / "suites" / f"{name}.yaml"
    assert Suite.read(path).cells()
    if "quick" in yaml.safe_load(path.read_text()):
        assert Suite.read(path, quick=True).cells()


@pytest.mark.parametrize("name", ["small", "formats", "nvfp4", "hifloat", "int8", "sub4bit"])
def test_suites_for_smollm_are_accepted_at_its_widths(name, tiny, tmp_path):
    model = tiny(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    for quick in (False, True):
        suite = Suite.read(ROOT / "suites" / f"{name}.yaml", model=str(model), calibration=str(text), quick=quick)
        for cell in suite.cells():
            pipeline.check(cell.recipe)


def test_the_reasoning_suite_samples_as_the_paper():
    evaluation = Suite.read(ROOT / "suites" / "paper-llm-reasoning.yaml").evaluation
    samples = {task: BENCHMARKS[task].samples for task in evaluation.tasks}
    assert samples == {"gsm8k": 1, "math500": 3, "aime24": 16, "aime25": 16, "gpqa_diamond": 10}
    assert evaluation.sampling.draws == Sampling().draws


def test_how_answers_are_sampled_is_checked_by_name(tmp_path):
    sampling = {"temperature": 0, "samples": 2}
    assert read(tmp_path, changed(evaluation={"sampling": sampling})).evaluation.sampling == Sampling(**sampling)


def changed(**changes) -> dict:
    return {**GOOD, **changes}


def row(**fields) -> dict:
    return changed(rows=[{"label": "Mine", **fields}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (row(method="batqant"), "row 'Mine': unknown method 'batqant'; did you mean 'batquant'"),
        (row(method="batquant", solver="gtpq"), "row 'Mine': unknown solver 'gtpq'; did you mean 'gptq'"),
        (row(settings={"epoch": 1}), "row 'Mine': unknown setting 'epoch'; did you mean 'epochs'"),
        (row(settings={"epochs": "many"}), "row 'Mine': setting epochs='many' of batquant"),
        (row(settings={"g": 16, "g1": 3}), "row 'Mine': batquant.g1=3 does not divide the transform block g=16"),
        (row(methd="rtn"), "row 'Mine': unknown entry 'methd'; did you mean 'method'"),
        (row(num_calibration_samples="few"), "row 'Mine': entry num_calibration_samples='few'"),
        (row(num_calibration_samples=0), "row 'Mine': num_calibration_samples=0 must be at least 1"),
        (row(scheme="W4A4"), "row 'Mine': 'scheme' is for the whole suite to say"),
        (row(method="rtn", schemes=["W8A8"]), "row 'Mine': 'W8A8' is not among the suite's schemes"),
        (row(method="rtn", seeds=[9]), "row 'Mine': 9 is not among the suite's seeds"),
        (changed(rows=[{"method": "rtn"}]), "row 1: it has no label"),
        (changed(rows=[]), "rows is empty"),
        (changed(rows={"RTN": {}}), "rows is a list"),
        (changed(rows=["rtn"]), "row 1: a row is a mapping"),
        (changed(schemes=["W4A4:mxpf4"]), "unknown format 'mxpf4'; did you mean 'mxfp4'"),
        (changed(schemes=[]), "schemes is empty"),
        (changed(seeds=["one"]), "entry seeds="),
        (changed(calibration={"sample": 3}), "calibration: unknown entry 'sample'; did you mean 'samples'"),
        (changed(evaluation={"window": "wide"}), "evaluation: entry window='wide'"),
        (changed(evaluation={"sampling": {"topk": 3}}), "evaluation: unknown setting of sampling 'topk'"),
        (changed(evaluation={"sampling": {"top_p": 2}}), "evaluation: sampling: top_p=2 is not a number above 0"),
        (changed(evaluation={"sampling": [1]}), "evaluation: sampling is a mapping"),
        (changed(ablation=[]), "unknown entry 'ablation'; did you mean 'ablations'"),
        (changed(model=""), "no model is named; give one with --model"),
        (changed(rows=[{"label": "a b"}, {"label": "A B"}]), "labels 'a b' and 'A B' both give the name"),
        (changed(ablations=[{"title": "Sizes"}]), "ablation 1: it needs a title, a row, and settings to vary"),
        (
            changed(ablations=[{**GOOD["ablations"][0], "vary": {"g2": [1]}}]),
            "row 'BATQuant': unknown setting 'g2'; did you mean 'g'",
        ),
        (changed(quick={"schemes": ["W5A5"]}), "no format of 5 bits"),
        ("- rows", "a suite is a mapping"),
        ("rows: [", "suite .*suite.yaml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_quick_needs_its_section(tmp_path):
    with pytest.raises(ValueError, match="it has no section 'quick'"):
        read(tmp_path, {key: value for key, value in GOOD.items() if key != "quick"}, quick=True)
