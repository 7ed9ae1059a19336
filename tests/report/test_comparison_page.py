"""The page of a comparison: what it says, what it escapes, and that a real browser draws it."""

from __future__ import annotations

import copy
import json
import re

import pytest
from tests.report.browser import Elements, dump_dom

from microbat.report import comparison_figures as figures
from microbat.report.comparison import render, verdict, write_comparison

SCHEMES = ("W4A4KV16", "W4A8KV16")
FIGURES = {"fig-quality", "fig-ablation-0", "fig-ablation-1", "fig-by-method", "fig-bimodality", "fig-time"}
HOSTILE = "<script>alert(1)</script>\"'&<img src=http://evil.example/x onerror=alert(2)>"
ROWS = (  # label, solver, learned, ratio, KL, recovery, minutes
    ("RTN", "rtn", False, 2.9, 1.2, 80.0, 1),
    ("GPTQ", "gptq", False, 2.1, 0.9, 85.0, 3),
    ("BATQuant + RTN", "rtn", True, 1.3, 0.35, 93.0, 11),
    ("BATQuant + GPTQ", "gptq", True, 1.2, 0.25, 95.0, 13),
    ("BATQuant + learned rounding", "learned", True, 1.19, 0.26, 95.5, 14),
)


def estimate(value: float, learned: bool, over: str = "windows") -> dict:
    return {"value": value, "error": value / 50, "over": "seeds" if learned else over}


def sampled(value: float) -> dict:
    counts = {"unparsed": 3, "truncated": 0, "samples": 2, "n": 50}
    return {"value": value, "error": 0.05, "over": "items", **counts}


def standing(label: str) -> dict:
    names = {"BATQuant + learned rounding": "best", "BATQuant + GPTQ": "tied"}
    return dict.fromkeys(("ratio", "kl", "recovery"), names.get(label, "behind"))


def entry(row: tuple, scheme: str, **varied: object) -> dict:
    label, solver, learned, ratio, kl, recovery, minutes = row
    return {
        "label": ", ".join(f"{key}={value}" for key, value in varied.items()) or label,
        "scheme": scheme,
        "seeds": [0, 1] if learned else [0],
        "failed": {},
        "varied": varied,
        "recipe": {"method": "batquant", "scheme": scheme, "scale_rule": "", "settings": {}},
        "preparers": [{"name": "batquant", "g1": 8}] if learned else [],
        "solver": {"name": solver},
        "family": int(learned),
        "standing": standing(label),
        "standing_in_family": standing(label),
        "perplexity": estimate(20 * ratio, learned),
        "ratio": estimate(ratio, learned),
        "kl": estimate(kl, learned),
        "top1": estimate(1 / ratio, learned),
        "tasks": {"piqa": estimate(0.0069 * recovery, learned, "items"), "gsm8k": sampled(0.006 * recovery)},
        "recovery": estimate(recovery, learned, "items"),
        "seconds": 60 * minutes,
        "machines": ["A processor, 2 threads"] if learned else ["NVIDIA H200"],
        "bits_per_weight": 4.25,
    }


@pytest.fixture(scope="module")
def content() -> dict:
    failed = {
        k: v for k, v in entry(ROWS[3], SCHEMES[0], g=128).items() if k not in ("perplexity", "ratio", "kl", "top1")
    }
    failed |= {
        "failed": {"0": "a width of 576 does not split into transform blocks of 128"},
        "seeds": [],
        "standing": {},
    }
    del failed["recovery"]
    return {
        "microbat": "0.1.0",
        "title": "SmolLM2-135M",
        "model": "some/SmolLM2-135M",
        "calibration": {"source": "self", "samples": 20, "length": 512},
        "evaluation": {
            "text": "wikitext-2-raw",
            "windows": 16,
            "window": 1024,
            "stride": 1024,
            "tokens": 16368,
            "perplexity": 20.0,
            "perplexity_stderr": 0.5,
        },
        "tasks": {"piqa": {"value": 0.7, "error": 0.01, "over": "items", "n": 100}, "gsm8k": sampled(0.6)},
        "groups": [
            {"title": "", "entries": [entry(row, scheme) for scheme in SCHEMES for row in ROWS]},
            {
                "title": "Transform block size",
                "entries": [*(entry(ROWS[3], SCHEMES[0], g=g) for g in (16, 32, 64)), failed],
            },
            {
                "title": "Transform and clipping",
                "entries": [
                    entry(ROWS[3], SCHEMES[0], transform=t, clip=c) for t in ("gpk", "none") for c in (True, False)
                ],
            },
        ],
    }


@pytest.fixture(scope="module")
def activations(make_report) -> list[dict]:
    records = make_report(num_blocks=1, num_records=3)["activations"]
    layer = records[0]["layer"]
    return [{**record, "layer": layer, "label": row[0]} for record, row in zip(records, ROWS[1:4], strict=True)]


def test_every_view_of_the_paper_is_there(content, activations):
    page = Elements(render(content, activations, [], "/* plotly */"))
    sections = {"quality", "last-step", "ablations", "activations", "time", "recipes", "failures", "table-last-step"}
    assert FIGURES | sections <= page.ids()
    for name in FIGURES:
        assert json.loads(page.scripts[f"{name}-data"])["data"], name


def test_the_verdict_names_the_best_and_what_cannot_be_told_from_it(content):
    sentences = verdict(content["groups"][0]["entries"])
    assert sentences[0] == (
        "W4A4KV16: BATQuant + learned rounding has the lowest perplexity, 1.190 ± 0.024 times the float model's. "
        "Not distinguishable from it: BATQuant + GPTQ."
    )
    assert len(sentences) == 2


def test_the_time_says_on_what(content):
    assert "on A processor, 2 threads and NVIDIA H200" in render(content, [], [], "")


def test_noise_is_marked_where_the_number_stands(content):
    page = render(content, [], [], "")
    assert '<td class="n"><b>1.190 ± 0.024</b></td>' in page
    assert '<td class="n" title="not distinguishable from the best">≈ 1.200 ± 0.024</td>' in page
    assert '<td class="n">2.900 ± 0.058</td>' in page
    assert "One seed shows no noise of seeds." in page


def test_benchmarks_stand_beside_the_float_models_with_what_was_not_judged(content):
    page = render(content, [], [], "")
    section = page[page.index('id="benchmarks"') : page.index('id="last-step"')]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", section)]
    assert rows[0] == ["Method", "piqa", "gsm8k"]
    assert rows[1] == ["float", "0.700 ± 0.010", "0.600 ± 0.050 (3 unparsed of 100)"]
    assert rows[2] == ["RTN", "0.552 ± 0.011", "0.480 ± 0.050 (3 unparsed of 100)"]
    assert len(rows) == len(SCHEMES) * (2 + len(ROWS))
    assert 'id="benchmarks"' not in render({**content, "tasks": {}}, [], [], "")


def test_the_last_step_compares_rows_with_equal_transforms(content):
    page = render(content, [], [], "")
    table = page[page.index('id="table-last-step"') :]
    rows = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")])
    cells = [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in rows]
    assert cells[0] == ["Scheme", "Transforms and clips", "rtn", "gptq", "learned", "GPTQ spares"]
    assert cells[1] == ["W4A4KV16", "none", "2.900 ± 0.058", "2.100 ± 0.042", "–", "30%"]
    assert cells[2][:3] == ["W4A4KV16", "BATQuant", "1.300 ± 0.026"]
    assert len(cells) == 1 + 2 * 2


def test_bars_start_at_the_float_model_and_carry_their_errors(content):
    figure = figures.bars(content["groups"][0]["entries"])
    assert [trace["name"] for trace in figure["data"]] == [row[0] for row in ROWS]
    rtn = figure["data"][0]
    assert (rtn["x"], rtn["base"]) == (list(SCHEMES), 1.0)
    assert rtn["y"] == pytest.approx([1.9, 1.9])
    assert rtn["error_y"]["array"] == pytest.approx([0.058, 0.058])
    recovery = figure["layout"]["updatemenus"][0]["buttons"][2]
    assert recovery["label"] == "Recovery"
    assert recovery["args"][0]["base"] == [100.0] * len(ROWS)
    assert recovery["args"][0]["y"][0] == pytest.approx([-20.0, -20.0])


def test_an_ablation_has_a_line_for_each_combination_of_its_other_settings(content):
    sizes, parts = (figures.ablation(group["entries"])["data"] for group in content["groups"][1:])
    assert [(line["x"], len(line["y"])) for line in sizes] == [(["16", "32", "64", "128"], 4)]
    assert sizes[0]["y"][3] is None
    assert [line["name"] for line in parts] == ["W4A4KV16, clip=True", "W4A4KV16, clip=False"]
    assert [line["x"] for line in parts] == [["gpk", "none"]] * 2


def test_a_family_is_named_by_the_words_that_its_rows_share(content):
    alike = copy.deepcopy(content)
    entries = [one for one in alike["groups"][0]["entries"] if one["label"] != "BATQuant + RTN"]
    alike["groups"][0]["entries"] = entries
    for one in entries:
        one["label"] = {"BATQuant + learned rounding": "BATQuant + GPTAQ"}.get(one["label"], one["label"])
    page = render(alike, [], [], "")
    table = page[page.index('id="table-last-step"') :]
    assert "<td>BATQuant</td>" in table
    assert "<td>BATQuant + GPT" not in table[: table.index("</table>")]


def test_what_was_not_measured_leaves_no_trace(content):
    bare = copy.deepcopy(content)
    for group in bare["groups"]:
        for item in group["entries"]:
            item.pop("recovery", None)
            item["standing"].pop("recovery", None)
    page = render(bare, [], [], "")
    assert "Recovery" not in page.replace("top-1 agreement and recovery", "")
    assert 'id="activations"' not in page
    failures = [{**e, "failed": {"0": "diverged"}, "standing": {}} for e in bare["groups"][0]["entries"]]
    failures = [{k: v for k, v in e.items() if k not in ("ratio", "kl", "perplexity", "top1")} for e in failures]
    page = render({**bare, "groups": [{"title": "", "entries": failures}]}, [], [], "")
    assert "W4A4KV16: nothing was measured." in page
    assert 'id="last-step"' not in page


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
CASE = {
    "scheme": "W4A4KV16",
    "benchmark": "vlmblind",
    "task": "Line Plot Intersections",
    "question": "How many times do they cross, e.g. {2}?",
    "answer": "0",
    "picture": PIXEL,
    "answers": [
        {"label": "float", "text": "{0}", "score": 1.0},
        {"label": "RTN", "text": "There is one: {1}. " + "Really. " * 200, "score": 0.0},
        {"label": "GPTQ", "text": "", "score": None},
        {"label": "BATQuant", "text": "{0}", "score": 0.75},
    ],
}


def test_case_studies_show_picture_question_and_answers_side_by_side(content):
    page = render(content, [], [CASE], "")
    section = page[page.index('id="cases"') : page.index('id="last-step"')]
    assert '<a href="#cases">Case studies</a>' in page
    assert f'<img src="{PIXEL}"' in section
    assert "under W4A4KV16 and their first seed" in section
    assert "How many times do they cross, e.g. {2}?" in section
    for label, mark, text in (("float", "✓", "{0}"), ("GPTQ", "–", "–"), ("BATQuant", "0.75", "{0}")):
        assert re.search(f"<td>{label}</td><td[^>]*>{mark}</td><td>{re.escape(text)}</td>", section), label
    assert re.search("<td>RTN</td><td class=.wrong.>✗</td><td>There is one: {1}.*Really. …|…</td>", section)
    assert section.count("Really.") < 80
    assert 'id="cases"' not in render(content, [], [], "")


def test_without_a_text_recovery_leads(content):
    measured = ("perplexity", "ratio", "kl", "top1")
    entries = [
        {k: v for k, v in one.items() if k not in measured} | {"standing": {"recovery": one["standing"]["recovery"]}}
        for one in content["groups"][0]["entries"]
    ]
    tasks = {"tiny_vlm": {**sampled(95.25), "by_task": {"lines": 0.9, "circles": 1.0}}}
    for one in entries:
        one["tasks"] = {"tiny_vlm": {**sampled(90.5), "by_task": {"lines": 0.8, "circles": 0.95}}}
        one["flips"] = estimate(7.5, False, "items")
    bare = {**content, "evaluation": {}, "tasks": tasks, "groups": [{"title": "", "entries": entries}]}
    page = render(bare, [], [], "")
    assert verdict(entries)[0] == (
        "W4A4KV16: BATQuant + learned rounding has the highest recovery, 95.50 ± 1.91 % of the float model's scores. "
        "Not distinguishable from it: BATQuant + GPTQ."
    )
    assert "Measured on benchmarks alone" in page
    assert "Perplexity" not in Elements(page).scripts["fig-quality-data"]
    assert "<th class=n>Perplexity</th>" not in page
    assert "95.25 ± 0.05" in page
    assert '<td class="n">80.0%</td>' in page
    assert "7.50 ± 0.15" in page
    assert "Flips: of a hundred items" in page
    assert 'id="table-last-step"' in page
    assert "Recovery over the benchmarks (%)" in Elements(page).scripts["fig-time-data"]


def test_every_string_is_escaped(content, activations):
    poisoned = copy.deepcopy(content)
    poisoned |= {"title": HOSTILE, "model": HOSTILE}
    poisoned["evaluation"]["text"] = poisoned["calibration"]["source"] = HOSTILE
    for group in poisoned["groups"]:
        group["title"] += HOSTILE if group["title"] else ""
        for item in group["entries"]:
            item["label"] += HOSTILE
            item["scheme"] += HOSTILE
            item["failed"] = dict.fromkeys(item["failed"], HOSTILE)
            item["recipe"][HOSTILE] = HOSTILE
            item["solver"]["name"] += HOSTILE
            item["varied"] = {key + HOSTILE: f"{value}{HOSTILE}" for key, value in item["varied"].items()}
    records = [record | {"label": record["label"] + HOSTILE, "layer": HOSTILE} for record in activations]
    case = {**CASE, **dict.fromkeys(("benchmark", "task", "question", "answer"), HOSTILE)}
    case["answers"] = [{**own, "label": HOSTILE, "text": HOSTILE} for own in CASE["answers"]]
    clean = Elements(render(content, activations, [CASE], ""))
    page = Elements(render(poisoned, records, [case], ""))
    assert {tag for tag, _ in page.found} == {tag for tag, _ in clean.found}
    assert not [a for _, a in page.found if "onerror" in a]
    assert {a["src"] for _, a in page.found if "src" in a} == {PIXEL}
    assert "alert(" not in "".join(text for name, text in page.scripts.items() if not name)
    for name in FIGURES:
        traces = json.loads(page.scripts[f"{name}-data"])
        assert "<script" not in json.dumps(traces), name


def test_browser_draws_every_figure(browser, content, activations, tmp_path):
    page = write_comparison(content, activations, [CASE], tmp_path / "comparison.html")
    assert list(tmp_path.iterdir()) == [page]
    drawn = dump_dom(browser, page, tmp_path / "profile")
    (root,) = re.findall(r"<html[^>]*>", drawn)[:1]
    assert "data-errors" not in root, root
    assert 'data-state="done"' in root
    assert f'data-figures="{len(FIGURES)}"' in root

    def inside(name: str) -> str:
        return drawn[drawn.index(f'id="{name}"') : drawn.index(f'id="{name}-data"')]

    assert all("main-svg" in inside(name) for name in FIGURES)
    assert inside("fig-quality").count('class="point"') == len(ROWS) * len(SCHEMES)
    assert inside("fig-quality").count('class="yerror"') == len(ROWS) * len(SCHEMES)
    assert inside("fig-ablation-0").count('class="point"') == 3
    assert inside("fig-time").count('class="point"') == len(ROWS) * len(SCHEMES)


PRESS = """
<script>
(async () => {
  const root = document.documentElement, pause = () => new Promise(done => setTimeout(done, 200));
  while (root.dataset.state !== "done") await pause();
  const quality = document.getElementById("fig-quality");
  quality.querySelectorAll("g.updatemenu-button")[1].dispatchEvent(new MouseEvent("click", { bubbles: true }));
  await pause();
  root.dataset.kl = quality.data.map(trace => trace.y[0]).join(" ");
  root.dataset.base = quality.data[0].base;
  const fold = document.querySelector("details.lazy");
  fold.open = true;
  await pause(); await pause(); await pause();
  root.dataset.surface = fold.querySelectorAll(".js-plotly-plot .main-svg").length > 0;
})();
</script></body>
"""


def test_browser_switches_the_metric_and_opens_a_method(browser, content, activations, tmp_path):
    page = write_comparison(content, activations, [], tmp_path / "comparison.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PRESS), encoding="utf-8")
    (root,) = re.findall(r"<html[^>]*>", dump_dom(browser, page, tmp_path / "profile"))[:1]
    assert "data-errors" not in root, root
    assert f'data-kl="{" ".join(str(row[4]) for row in ROWS)}"' in root
    assert 'data-base="0"' in root
    assert 'data-surface="true"' in root
