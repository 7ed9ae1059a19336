"""``microbat compare`` end to end on a tiny model: the numbers, resumption, failures, the folder of another comparison."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import microbat
from microbat import comparison, measure, pipeline
from microbat.cli import app
from microbat.evaluation.benchmarks import BENCHMARKS
from microbat.evaluation.quality import recovery
from microbat.unfinished import FolderKeeper

LABELS = ["RTN", "GPTQ", "BATQuant + RTN", "BATQuant + GPTQ"]


def learned(solver: str) -> dict:
    return {"method": "batquant", "solver": solver, "settings": {"epochs": 1}}


@pytest.fixture(scope="module")
def content(tiny, text_file) -> dict:
    """A suite: four rows at two schemes, two seeds for what is learned, and an ablation of two cells."""
    return {
        "title": "Tiny",
        "model": str(tiny()),
        "calibration": {"source": str(text_file), "samples": 6, "length": 32},
        "evaluation": {"text": str(text_file), "window": 64, "windows": 3},
        "schemes": ["W4A4KV16", "W4A8KV16"],
        "seeds": [0, 1],
        "rows": [
            {"label": "RTN", "method": "rtn", "precision": "float32"},
            {"label": "GPTQ", "method": "gptq", "precision": "float32"},
            {"label": "BATQuant + RTN", **learned("rtn")},
            {"label": "BATQuant + GPTQ", **learned("gptq")},
        ],
        "ablations": [
            {
                "title": "Sizes",
                "row": {"label": "BATQuant", **learned("rtn")},
                "vary": {"g": [16, 32]},
                "schemes": ["W4A4KV16"],
                "seeds": [0],
            }
        ],
        "quick": {
            "schemes": ["W4A4KV16"],
            "seeds": [0],
            "rows": [{"label": "RTN", "method": "rtn"}, {"label": "BATQuant", **learned("rtn")}],
            "ablations": [],
        },
    }


@pytest.fixture(scope="module")
def suite(content, tmp_path_factory) -> Path:
    return save(content, tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def whole(suite, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of an uninterrupted comparison, and its result."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, microbat.compare(suite, out=out)


def save(content: dict, folder: Path) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def entry(result: dict, label: str, scheme: str = "W4A4KV16") -> dict:
    return next(e for e in result["groups"][0]["entries"] if (e["label"], e["scheme"]) == (label, scheme))


def without_times(result: dict) -> dict:
    plain = json.loads(json.dumps(result))
    for group in plain["groups"]:
        for item in group["entries"]:
            item.pop("seconds", None)
    return plain


def spy(monkeypatch, module, name: str) -> list:
    """First positional argument of every call of a module's function."""
    calls, original = [], getattr(module, name)

    def called(first, *args, **kwargs):
        calls.append(first)
        return original(first, *args, **kwargs)

    monkeypatch.setattr(module, name, called)
    return calls


def test_each_method_has_its_numbers_with_their_spread(whole):
    out, result = whole
    assert [group["title"] for group in result["groups"]] == ["", "Sizes"]
    entries = result["groups"][0]["entries"]
    assert [(e["label"], e["scheme"]) for e in entries] == [(n, s) for s in ("W4A4KV16", "W4A8KV16") for n in LABELS]
    assert [e["seeds"] for e in entries[:4]] == [[0], [0], [0, 1], [0, 1]]
    assert [e["ratio"]["over"] for e in entries[:4]] == ["windows", "windows", "seeds", "seeds"]
    runs = [
        json.loads((out / "cells" / f"batquant-rtn-w4a4kv16-seed{seed}" / "numbers.json").read_text())["quality"][
            "result"
        ]
        for seed in (0, 1)
    ]
    assert entries[2]["kl"]["value"] == pytest.approx(statistics.fmean(run["kl"] for run in runs))
    assert entries[2]["kl"]["error"] == pytest.approx(statistics.stdev(run["kl"] for run in runs))
    assert [[run[key] for key in ("kl", "window_nll")] for run in entries[2]["runs"]] == [
        [run[key] for key in ("kl", "window_nll")] for run in runs
    ]
    assert entries[0]["bits_per_weight"] == pytest.approx(4.25)
    assert entries[2]["preparers"][0]["epochs"] == 1
    assert json.loads((out / "comparison.json").read_text()) == json.loads(json.dumps(result))


def test_the_numbers_are_those_of_evaluate(whole, content):
    out, result = whole
    measured = microbat.evaluate(
        {"float": content["model"], "rtn": out / "cells" / "rtn-w4a8kv16-seed0"}, **content["evaluation"]
    )
    assert entry(result, "RTN", "W4A8KV16")["kl"]["value"] == pytest.approx(measured["rows"][1]["kl"])
    assert result["evaluation"]["perplexity"] == pytest.approx(measured["rows"][0]["perplexity"])


def test_standings_name_one_best_and_what_cannot_be_told_from_it(whole):
    entries = [e for e in whole[1]["groups"][0]["entries"] if e["scheme"] == "W4A4KV16"]
    for metric in ("ratio", "kl"):
        best = min(entries, key=lambda e: e[metric]["value"])
        assert [e["label"] for e in entries if e["standing"][metric] == "best"] == [best["label"]]
    assert entry(whole[1], "RTN")["standing"]["kl"] == "behind"
    for family in (LABELS[:2], LABELS[2:]):
        assert [entry(whole[1], label)["standing_in_family"]["kl"] for label in family].count("best") == 1


def test_calibration_tokens_and_float_passes_are_shared(content, tmp_path, monkeypatch):
    passes = spy(monkeypatch, measure, "evaluate")
    microbat.compare(save(content, tmp_path), out=tmp_path / "out", quick=True)
    assert [list(models) for models in passes] == [["float", "rtn-w4a4kv16-seed0", "batquant-w4a4kv16-seed0"]]
    assert len(list((tmp_path / "out" / "tokens").iterdir())) == 1
    assert not list((tmp_path / "out" / "cells").glob("*/calibration.safetensors"))


def test_a_finished_comparison_is_not_made_again(whole, suite, monkeypatch):
    runs, passes = spy(monkeypatch, pipeline, "run"), spy(monkeypatch, measure, "evaluate")
    again = microbat.compare(suite, out=whole[0])
    assert (runs, passes) == ([], [])
    assert again == whole[1]


def test_an_interrupted_comparison_goes_on_to_the_same_numbers(suite, whole, tmp_path, monkeypatch):
    """Stopped in the middle of a cell, then in the middle of measuring."""
    save_block, saved = FolderKeeper.save, []

    def stop_in_the_fourth_cell(self, index, *rest):
        save_block(self, index, *rest)
        saved.append(index)
        if len(saved) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FolderKeeper, "save", stop_in_the_fourth_cell)
        with pytest.raises(KeyboardInterrupt):
            microbat.compare(suite, out=tmp_path / "out")
    assert len(list((tmp_path / "out" / "cells").glob("*.partial"))) == 1

    monkeypatch.setattr(measure, "held_together", lambda model: 6)  # five cells beside the float model
    with monkeypatch.context() as patch:
        runs, original, passes = spy(patch, pipeline, "run"), measure.evaluate, []

        def stop_in_the_second_pass(models, **options):
            passes.append(list(models)[1:])
            if len(passes) == 2:
                raise KeyboardInterrupt
            return original(models, **options)

        patch.setattr(measure, "evaluate", stop_in_the_second_pass)
        with pytest.raises(KeyboardInterrupt):
            microbat.compare(suite, out=tmp_path / "out")
    assert len(runs) == 14 - 3

    runs, rest = spy(monkeypatch, pipeline, "run"), spy(monkeypatch, measure, "evaluate")
    result = microbat.compare(suite, out=tmp_path / "out")
    assert runs == []
    assert [len(models) - 1 for models in rest] == [5, 4]
    assert list(rest[0])[1:] == passes[1]
    assert without_times(result) == without_times(whole[1])


def test_another_text_is_measured_anew_without_quantizing_again(content, tmp_path, text_file, monkeypatch):
    suite, out = save(content, tmp_path), tmp_path / "out"
    first = microbat.compare(suite, out=out, quick=True)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[5000:])
    runs = spy(monkeypatch, pipeline, "run")
    second = microbat.compare(suite, out=out, quick=True, text=str(other))
    assert runs == []
    assert second["evaluation"]["text"] == "other.txt"
    assert entry(first, "RTN")["kl"] != entry(second, "RTN")["kl"]


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(content, tmp_path, monkeypatch):
    run = pipeline.run

    def failing(recipe, *rest, **options):
        if recipe.settings.get("g") == 16:
            raise ValueError("blocks of 16 do not suit it")
        return run(recipe, *rest, **options)

    monkeypatch.setattr(pipeline, "run", failing)
    bad = {"title": "Sizes", "row": {"label": "x", **learned("rtn")}, "vary": {"g": [32, 16]}}
    suite = save({**content, "quick": {**content["quick"], "ablations": [bad]}}, tmp_path)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", "--suite", str(suite), "--quick", "--out", str(out)])
    assert done.exit_code == 1, done.output
    assert "g=16, seed 0: blocks of 16 do not suit it" in done.output
    fine, broken = json.loads((out / "comparison.json").read_text())["groups"][1]["entries"]
    assert fine["standing"] == {"ratio": "best", "kl": "best"}
    assert broken["failed"] == {"0": "blocks of 16 do not suit it"}
    assert "ratio" not in broken
    assert "failed: seed 0: blocks of 16" in (out / "comparison.html").read_text()


def test_a_cell_that_fits_no_layer_is_refused_before_any_runs(content, tmp_path, monkeypatch):
    runs = spy(monkeypatch, pipeline, "run")
    bad = {"title": "Sizes", "row": {"label": "x", **learned("rtn")}, "vary": {"g": [32, 128]}}
    suite = save({**content, "quick": {**content["quick"], "ablations": [bad]}}, tmp_path)
    with pytest.raises(
        ValueError, match="row 'g=128': layer 'model.layers.0.self_attn.q_proj': .*does not divide 64 channels"
    ):
        microbat.compare(suite, out=tmp_path / "out", quick=True)
    assert runs == []


def test_a_cell_that_does_not_fit_the_device_stops_no_other(content, tmp_path, monkeypatch):
    run = pipeline.run

    def short_of_memory(recipe, *rest, **options):
        if recipe.method == "rtn":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(recipe, *rest, **options)

    monkeypatch.setattr(pipeline, "run", short_of_memory)
    result = microbat.compare(save(content, tmp_path), out=tmp_path / "out", quick=True)
    assert entry(result, "RTN")["failed"] == {"0": "CUDA out of memory"}
    assert any("ratio" in other for other in result["groups"][0]["entries"])


def test_the_command_prints_the_table_and_says_where_the_rest_is(content, tmp_path, monkeypatch):
    suite = save(content, tmp_path)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compare", "--suite", str(suite), "--quick"])
    assert done.exit_code == 0, done.output
    assert "Tiny, W4A4KV16" in done.output
    assert "* best, ≈ not distinguishable from the best" in done.output
    assert (tmp_path / "microbat-compare" / "tiny-quick" / "comparison.html").is_file()


def test_every_method_has_a_picture_of_one_common_layer(whole, suite):
    out, _ = whole
    chosen = comparison.Suite.read(suite)
    pictures = comparison._pictures(chosen, out, chosen.cells())
    assert [picture["label"] for picture in pictures] == LABELS
    assert {picture["layer"] for picture in pictures} == {"model.layers.1.mlp.down_proj"}
    page = (out / "comparison.html").read_text()
    assert "model.layers.1.mlp.down_proj under every method" in page


def test_benchmarks_give_recovery(content, tmp_path, monkeypatch):
    scores = {
        "float": {"piqa": (0.8, 0.02), "boolq": (0.5, 0.03)},
        "other": {"piqa": (0.6, 0.02), "boolq": (0.5, 0.04)},
    }
    asked = []

    def score(model, tasks, *, answers):
        asked.append(str(model))
        chosen = scores["float" if str(model) == content["model"] else "other"]
        return {task: dict(zip(("score", "stderr"), chosen[task], strict=True)) for task in tasks.names}

    monkeypatch.setattr(measure, "task_scores", score)
    evaluation = {**content["evaluation"], "tasks": ["piqa", "boolq"], "limit": 5}
    suite = save({**content, "evaluation": evaluation}, tmp_path)
    result = microbat.compare(suite, out=tmp_path / "out", quick=True)
    found = entry(result, "RTN")["recovery"]
    expected = recovery({"piqa": 0.6, "boolq": 0.5}, {"piqa": 0.8, "boolq": 0.5})
    assert found["value"] == pytest.approx(expected) == 87.5
    assert found["error"] == pytest.approx(100 * ((0.02 / 0.8) ** 2 + (0.04 / 0.5) ** 2) ** 0.5 / 2)
    assert entry(result, "RTN")["tasks"]["piqa"] == {"value": 0.6, "error": 0.02, "over": "items", "n": None}
    assert {e["standing"]["recovery"] for e in result["groups"][0]["entries"]} == {"best", "tied"}
    assert asked[0] == content["model"]
    microbat.compare(suite, out=tmp_path / "out", quick=True)
    assert len(asked) == 3


def test_a_difference_that_every_item_bears_out_is_one(content, tmp_path, monkeypatch):
    """Where the items are known, what they have in common is no noise: 95 and 90 of 100, the same 90 among them."""
    right = {"float": 100, "RTN": 90, "BATQuant": 95}

    def score(model, tasks, *, answers):
        name = next((label for label in right if Path(model).name.startswith(label.lower())), "float")
        items = [float(i < right[name]) for i in range(100)]
        return {"piqa": {"score": sum(items) / 100, "stderr": 0.05, "items": [items]}}

    monkeypatch.setattr(measure, "task_scores", score)
    evaluation = {**content["evaluation"], "tasks": ["piqa"]}
    result = microbat.compare(save({**content, "evaluation": evaluation}, tmp_path), out=tmp_path / "out", quick=True)
    assert entry(result, "BATQuant")["standing"]["recovery"] == "best"
    assert entry(result, "RTN")["standing"]["recovery"] == "behind"


def test_answers_in_the_models_own_words_are_kept_apart_for_each_way_of_drawing_them(content, tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"How many is {i}?", "answer": f"#### {i}"} for i in range(1, 4)]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    drawn = []

    def verdict_of_a_draw(fields):
        return lambda text: drawn.append(text) or len(drawn) % 3 != 0

    monkeypatch.setitem(BENCHMARKS, "gsm8k", dataclasses.replace(BENCHMARKS["gsm8k"], judge=verdict_of_a_draw))
    sampling = {"max_new_tokens": 5, "samples": 2}
    evaluation = {**content["evaluation"], "tasks": ["gsm8k"], "data": str(tmp_path), "sampling": sampling}
    changed = {**content, "evaluation": evaluation}
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", "--suite", str(save(changed, tmp_path)), "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads((out / "comparison.json").read_text())
    score = {"over": "items", "unparsed": 0, "truncated": 6, "samples": 2, "n": 3}
    assert result["tasks"]["gsm8k"].items() >= score.items()
    found = entry(result, "RTN")
    assert found["tasks"]["gsm8k"].items() >= score.items()
    assert found["recovery"]["value"] == pytest.approx(
        100 * found["tasks"]["gsm8k"]["value"] / result["tasks"]["gsm8k"]["value"]
    )
    assert "Tiny, W4A4KV16: benchmarks" in done.output
    for place in (done.output, (out / "comparison.html").read_text()):
        assert "(6 truncated of 6)" in place
    assert len(drawn) == 3 * 6

    (out / "numbers.json").unlink()
    microbat.compare(tmp_path / "tiny.yaml", out=out, quick=True)
    assert len(drawn) == 3 * 6  # judged before, kept since
    sampling["top_k"] = 5
    microbat.compare(save(changed, tmp_path), out=out, quick=True)
    assert len(drawn) == 2 * 3 * 6


def test_benchmarks_that_the_float_model_fails_leave_recovery_out(content, tmp_path, monkeypatch):
    scores = {"piqa": {"score": 0.0, "stderr": None}}
    monkeypatch.setattr(measure, "task_scores", lambda model, tasks, *, answers: scores)
    evaluation = {**content["evaluation"], "tasks": ["piqa"]}
    suite = save({**content, "evaluation": evaluation}, tmp_path)
    done = CliRunner().invoke(app, ["compare", "--suite", str(suite), "--quick", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "failed" not in done.output
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "recovery" not in entry(result, "RTN")
    assert entry(result, "RTN")["tasks"]["piqa"]["value"] == 0


class TestBadInput:
    def fails(self, content, tmp_path, message: str) -> None:
        done = CliRunner().invoke(
            app, ["compare", "--suite", str(save(content, tmp_path)), "--out", str(tmp_path / "out")]
        )
        assert done.exit_code == 2, done.output
        assert message in done.output.replace("\n", " ")
        assert "Traceback" not in done.output
        assert not (tmp_path / "out").exists()

    def test_an_unknown_method_names_the_row(self, content, tmp_path):
        rows = [*content["rows"], {"label": "Mine", "method": "batqant"}]
        self.fails({**content, "rows": rows}, tmp_path, "row 'Mine': unknown method 'batqant'; did you mean 'batquant'")

    def test_an_unknown_setting_names_the_row(self, content, tmp_path):
        rows = [{"label": "Mine", "method": "gptq", "settings": {"dampin": 0.1}}]
        self.fails({**content, "rows": rows}, tmp_path, "row 'Mine': unknown setting 'dampin'; did you mean 'damping'")

    def test_what_the_model_cannot_take_names_the_row(self, content, tmp_path):
        rows = [*content["rows"], {"label": "Mine", "method": "rtn", "calibration": "wikitext-2"}]
        self.fails({**content, "rows": rows}, tmp_path, "row 'Mine': unknown calibration source 'wikitext-2'")

    def test_text_windows_and_benchmarks_are_checked_first(self, content, tmp_path):
        evaluation = content["evaluation"]
        self.fails({**content, "evaluation": {**evaluation, "text": "wikitex-2"}}, tmp_path, "unknown text 'wikitex-2'")
        self.fails({**content, "evaluation": {**evaluation, "window": 10**6}}, tmp_path, "fewer than one window")
        wrong = {**evaluation, "tasks": ["pika"], "data": str(tmp_path)}
        self.fails({**content, "evaluation": wrong}, tmp_path, "unknown task 'pika'; did you mean 'piqa'")
        missing = {**evaluation, "tasks": ["math500"], "data": str(tmp_path)}
        self.fails({**content, "evaluation": missing}, tmp_path, "math500/test.jsonl")

    def test_short_calibration_text_stops_everything(self, content, tmp_path):
        short = tmp_path / "short.txt"
        short.write_text("w1 w2 w3")
        suite = save({**content, "calibration": {"source": str(short)}}, tmp_path)
        with pytest.raises(ValueError, match=r"has \d+ tokens; 64 sequences of 512 need"):
            microbat.compare(suite, out=tmp_path / "out")
        assert not (tmp_path / "out" / "cells").exists()

    def test_a_missing_suite(self, tmp_path):
        done = CliRunner().invoke(app, ["compare", "--suite", str(tmp_path / "none.yaml")])
        assert done.exit_code == 2
        assert "none.yaml" in done.output

    def test_the_folder_of_another_comparison(self, content, tmp_path, whole):
        rows = [{**content["rows"][0], "scale_rule": "floor"}]
        with pytest.raises(ValueError, match=r"rtn-w4a4kv16-seed0 was made by another recipe; remove it"):
            microbat.compare(save({**content, "rows": rows}, tmp_path), out=whole[0])


def test_pictures_alone_without_a_text(tiny, tmp_path, monkeypatch):
    """A vision-language model on a benchmark of pictures: recovery leads, cases stand on the page. Then on answers, too."""
    image = pytest.importorskip("PIL.Image")
    rows = []
    for index in range(6):
        image.new("RGB", (16 + 8 * index, 16), (40 * index, 90, 200)).save(tmp_path / f"{index}.png")
        row = {"image": f"{index}.png", "question": f"How many? {index}", "answer": str(index), "task": "ab"[index % 2]}
        rows.append(json.dumps(row))
    for folder in ("held-out", "pairs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text("\n".join(row.replace(': "', ': "../', 1) for row in rows))
    asked = []

    def judge(fields):  # the float model, asked first, is always right; RTN then never, GPTQ about its even questions
        return lambda text: (
            asked.append(text) or len(asked) <= 6 or (len(asked) > 12 and int(fields["answer"]) % 2 == 0)
        )

    monkeypatch.setitem(BENCHMARKS, "tiny_vlm", dataclasses.replace(BENCHMARKS["tiny_vlm"], judge=judge))
    suite = {
        "title": "Pictures",
        "model": str(tiny("qwen3_vl")),
        "calibration": {"source": str(tmp_path / "pairs"), "samples": 4, "length": 64},
        "evaluation": {"text": "", "tasks": ["tiny_vlm"], "data": str(tmp_path), "sampling": {"max_new_tokens": 3}},
        "schemes": ["W4A4KV16"],
        "rows": [{"label": "RTN", "method": "rtn"}, {"label": "GPTQ", "method": "gptq"}],
    }
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", "--suite", str(save(suite, tmp_path)), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "perplexity" not in done.output
    result = json.loads((out / "comparison.json").read_text())
    assert result["evaluation"] == {}
    assert result["tasks"]["tiny_vlm"]["value"] == 100
    rtn, gptq = entry(result, "RTN"), entry(result, "GPTQ")
    assert [one["recovery"]["value"] for one in (rtn, gptq)] == [0, 50]
    assert [one["flips"]["value"] for one in (rtn, gptq)] == [100, 50]
    assert "flips %" in done.output
    assert [one["standing"] for one in (rtn, gptq)] == [{"recovery": "behind"}, {"recovery": "best"}]
    assert gptq["tasks"]["tiny_vlm"]["by_task"] == {"a": 1, "b": 0}
    page = (out / "comparison.html").read_text()
    section = page[page.index('id="cases"') : page.index('id="activations"')]
    assert section.count('src="data:image/png;base64,') == 3
    assert all(f"How many? {index}" in section for index in (0, 2, 4))
    assert not any(f"How many? {index}" in section for index in (1, 3, 5))

    suite["evaluation"]["text"] = str(tmp_path / "pairs")  # the answers' likelihoods besides, of the same cells
    done = CliRunner().invoke(app, ["compare", "--suite", str(save(suite, tmp_path)), "--out", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads((out / "comparison.json").read_text())
    assert (result["evaluation"]["windows"], result["evaluation"]["window"]) == (6, None)
    assert [one["recovery"]["value"] for one in (entry(result, "RTN"), entry(result, "GPTQ"))] == [0, 50]
    assert all(one["kl"]["value"] > 0 for one in (entry(result, "RTN"), entry(result, "GPTQ")))
    assert "Measured on pairs, 6 answers, the same for all" in (out / "comparison.html").read_text()
    suite["evaluation"]["skip"] = 2
    done = CliRunner().invoke(app, ["compare", "--suite", str(save(suite, tmp_path)), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "Measured on pairs, 4 answers, after the first 2, the same" in (out / "comparison.html").read_text()


def test_a_suite_that_measures_nothing_is_refused(content, tmp_path):
    nothing = {**content, "evaluation": {"text": ""}}
    with pytest.raises(ValueError, match="evaluation: nothing is measured: it needs a text, or tasks"):
        microbat.compare(save(nothing, tmp_path), out=tmp_path / "out")
    before = {**content, "evaluation": {"skip": -1}}
    with pytest.raises(ValueError, match="evaluation: skip=-1 must be 0 or more"):
        microbat.compare(save(before, tmp_path), out=tmp_path / "out")
