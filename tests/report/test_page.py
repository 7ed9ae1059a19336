"""The report page: what it says, that it is safe and complete in itself, and that a real browser draws it."""

from __future__ import annotations

import html
import json
import math
import re
import sys

import pytest
from tests.report.browser import Elements, dump_dom

from microbat.report import distributions, figures, write_page
from microbat.report.page import render
from microbat.report.sections import json_in_html, layer_table
from microbat.report.text import duration, fixed, number, percent, size
from microbat.report.verdict import verdict

FIGURES = ["fig-layers", "fig-blocks", "fig-training", "fig-training-map", "fig-bimodality"]
FIGURES += [f"fig-{kind}-{index}" for kind in ("surface", "scaled") for index in (0, 1)]
SURFACES = 2  # of them, each with two WebGL scenes
HOSTILE = "<script>alert(1)</script>\"'&</title><img src=http://evil.example/x onerror=alert(2)>"


def page_of(report: dict) -> Elements:
    return Elements(render(report, "/* plotly */"))


@pytest.fixture(scope="module")
def report(make_report) -> dict:
    return json.loads(json.dumps(make_report()))


def test_every_section_and_figure_is_there(report):
    page = page_of(report)
    assert {*FIGURES, "verdict", "facts", "table-evaluation", "recipe-details", "table-layers"} <= page.ids()
    for name in FIGURES:
        figure = json.loads(page.scripts[f"{name}-data"])
        assert figure["data"], name
    rows = [attributes for tag, attributes in page.found if tag == "tr"]
    assert len(rows) > len(report["layers"])


def test_layers_outside_the_blocks_stand_in_the_table(report):
    head = {"name": "lm_head", "shape": [64, 32], "format": "mxfp4", "bits": 4.25}
    table = layer_table(report | {"outside": [head]})
    assert table.count("<tr>") == layer_table(report).count("<tr>") + 1
    assert "<td>lm_head</td>" in table


@pytest.mark.parametrize(
    ("missing", "ids"),
    [
        ("evaluation", {"table-evaluation", "quality"}),
        ("layers", {"fig-layers", "table-layers", "layers"}),
        ("blocks", {"fig-blocks", "fig-training", "fig-training-map", "training"}),
        ("activations", {*FIGURES[4:], "activations"}),
        ("recipe", {"recipe-details"}),
        ("bytes", set()),
        ("formats", set()),
    ],
)
def test_a_missing_part_leaves_out_its_section_only(report, missing, ids):
    whole = page_of(report).ids()
    without = page_of({key: value for key, value in report.items() if key != missing}).ids()
    emptied = page_of(report | {missing: None}).ids()
    assert without == emptied == {name for name in whole if name.removesuffix("-data") not in ids}


def test_an_empty_report_is_a_page_without_plotly():
    page = render({}, "/* plotly */")
    assert "has not been evaluated" in page
    assert "/* plotly */" not in page


def test_every_string_is_escaped(report):
    def poison(value):
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()} | {HOSTILE: [HOSTILE]}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return value + HOSTILE if isinstance(value, str) else value

    poisoned = poison({key: value for key, value in report.items() if key != "evaluation"})
    poisoned["evaluation"] = report["evaluation"] | {
        "text": HOSTILE,
        "rows": [row | {"name": row["name"] + HOSTILE} for row in report["evaluation"]["rows"]],
    }
    clean, page = page_of(report), page_of(poisoned)
    assert "alert(" not in "".join(text for name, text in page.scripts.items() if not name)
    assert {tag for tag, _ in page.found} == {tag for tag, _ in clean.found}
    assert not [attributes for _, attributes in page.found if "onerror" in attributes or "src" in attributes]
    assert sum(tag == "script" for tag, _ in page.found) == sum(tag == "script" for tag, _ in clean.found)
    # plotly reads a little HTML in its labels: there, too, names must be text
    labels = json.loads(page.scripts["fig-layers-data"])["data"][0]
    assert "<script" not in labels["name"] + "".join(labels["text"])


def test_json_in_html_cannot_leave_its_element_and_has_no_nan():
    text = json_in_html({"a": ["</script><!--", math.nan, math.inf, "é\u2028", 1.5]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": ["</script><!--", None, None, "é\u2028", 1.5]}


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_non_finite_numbers_read_as_a_dash(make_report, hole):
    report = make_report(num_blocks=3, num_records=1)
    report["layers"][0] |= {"output_error": hole, "weight_error": hole, "bits": hole}
    report["blocks"][0] |= {"error": hole, "loss": [hole, 0.5, hole]}
    report["blocks"][1]["loss"] = [hole, hole]
    report["evaluation"]["rows"][2] |= {"perplexity": hole, "kl": hole, "top1": hole}
    side = report["activations"][0]["before"]
    side["surface"][0][0] = side["scaled"][0][0] = side["bimodality"][0] = hole
    page = render(report, "")
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    assert '<td class="n" data-v="">–</td>' in page


def test_verdict_compares_with_float_and_rtn(report):
    assert verdict(report) == (
        "batquant + gptq, W4A4KV16, reaches perplexity 27.90, 1.24 times the float model's 22.55, at 4.27 bits per "
        "weight. It agrees with the float model on the most likely token 81.0% of the time. Plain round-to-nearest "
        "reaches 66.70 (2.96 times); 80% of that loss (in nats) is avoided."
    )


def test_verdict_never_claims_a_baseline_as_its_own(report):
    rows = [row for row in report["evaluation"]["rows"] if row["name"] != "batquant"]
    assert "not been evaluated" in verdict(report | {"evaluation": {"rows": rows[:2]}})
    assert "perplexity 66.70" in verdict(report | {"method": "rtn", "solver": None})
    named = [*rows[:2], {"name": "batquant + gptq", "perplexity": 30.0}]
    assert "perplexity 30.00" in verdict(report | {"evaluation": {"rows": named}})


def test_worst_expert_stands_for_its_kind():
    layers = [
        {"name": f"model.layers.0.experts.{i}.up_proj", "block": 0, "kind": "up_proj", "output_error": error}
        for i, error in enumerate((0.1, 0.3, None, 0.2))
    ]
    (trace,) = figures.layer_errors([*layers, {"name": "lm_head", "block": None, "kind": "lm_head"}])["data"]
    assert (trace["x"], trace["y"]) == ([0], [0.3])
    assert "experts.1" in trace["text"][0]


def test_long_curves_are_averaged_and_start_at_one(report):
    blocks = [block | {"loss": [1 / (step + 1) for step in range(5000)]} for block in report["blocks"][:2]]
    curve = figures.training_curves(blocks)["data"][0]
    assert len(curve["x"]) == len(curve["y"]) == figures.MAX_STEPS
    assert curve["y"][0] == 1
    assert curve["x"][0] < curve["x"][-1] <= 5000


def test_histogram_counts_every_value_and_marks_the_grid(report):
    record = report["activations"][0]
    figure = distributions.scaled_values(record)
    assert [sum(trace["y"]) for trace in figure["data"]] == pytest.approx([1.0] * 6)
    marked = {line["x0"] for line in figure["layout"]["shapes"]}
    assert marked == {sign * point for point in record["grid"] for sign in (-1, 1)}
    fine = distributions.scaled_values(record | {"grid": [float(n) for n in range(128)]})
    assert {line["x0"] for line in fine["layout"]["shapes"]} == {-127.0, 127.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.012345), "0.01235"),
        (number(22.55), "22.55"),
        (number(16368), "16,368"),
        (number(3.2e-7), "3.20e-07"),
        (number(0.0), "0"),
        (number(None), "–"),
        (percent(0.8123), "81.2%"),
        (fixed(1.376, 2), "1.38"),
        (size(72.5 * 2**20), "72.5 MiB"),
        (size(12), "12 B"),
        (duration(605), "10 min 5 s"),
        (duration(7500), "2 h 5 min"),
        (duration(math.nan), "–"),
    ],
)
def test_numbers_as_people_write_them(text, expected):
    assert text == expected


def test_write_page_returns_its_path_and_leaves_nothing_else(report, tmp_path):
    path = write_page(report, tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8").count("* plotly.js v") == 1


def test_without_plotly_the_error_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'microbat\[report\]'"):
        write_page(report, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_page_loads_nothing(report, tmp_path):
    page = Elements(write_page(report, tmp_path / "report.html").read_text(encoding="utf-8"))
    sources = [
        (tag, value)
        for tag, attributes in page.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "action", "poster") and not value.startswith(("#", "data:"))
    ]
    assert sources == []
    (policy,) = [a["content"] for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy


@pytest.fixture(scope="module")
def drawn(browser, report, tmp_path_factory) -> str:
    """The page's DOM after a headless Chromium has run it."""
    folder = tmp_path_factory.mktemp("browser")
    return dump_dom(browser, write_page(report, folder / "report.html"), folder / "profile")


def test_browser_draws_every_figure_without_errors(drawn):
    (root,) = re.findall(r"<html[^>]*>", drawn)[:1]
    assert "data-errors" not in root, root
    assert 'data-state="done"' in root
    assert f'data-figures="{len(FIGURES)}"' in root
    figures_drawn = {name: css for css, name in re.findall(r'<div class="(figure[^"]*)" id="(fig-[^"]*)"', drawn)}
    assert set(figures_drawn) == set(FIGURES)
    for name, classes in figures_drawn.items():
        assert "js-plotly-plot" in classes, name
        start = drawn.index(f'id="{name}"')
        assert "main-svg" in drawn[start : drawn.index(f'id="{name}-data"')], name


def test_browser_draws_marks_not_just_frames(drawn):
    def inside(name: str) -> str:
        return drawn[drawn.index(f'id="{name}"') : drawn.index(f'id="{name}-data"')]

    assert inside("fig-layers").count('class="point"') == 30 * 7
    assert inside("fig-training").count("js-line") >= 30
    assert inside("fig-scaled-0").count('class="point"') > 100
    assert "<image" in inside("fig-training-map")
    for index in range(SURFACES):
        assert inside(f"fig-surface-{index}").count("<canvas") >= 2
        assert "WebGL is not supported" not in inside(f"fig-surface-{index}")


CLICKS = """
<script>
(async () => {
  const root = document.documentElement, pause = () => new Promise(done => setTimeout(done, 200));
  const byId = id => document.getElementById(id), seen = {};
  while (root.dataset.state !== "done") await pause();

  const rows = () => [...byId("table-layers").tBodies[0].rows];
  const error = row => Number(row.cells[5].dataset.v);
  byId("table-layers").querySelectorAll("th button")[5].click();
  seen.descending = rows().every((row, i, all) => !i || error(all[i - 1]) >= error(row));
  byId("table-layers").querySelectorAll("th button")[5].click();
  seen.ascending = rows().every((row, i, all) => !i || error(all[i - 1]) <= error(row));
  const filter = document.querySelector("input[data-filters]");
  filter.value = "Down_Proj";
  filter.dispatchEvent(new Event("input"));
  seen.filtered = rows().filter(row => !row.hidden).length;

  const select = document.querySelector("select[data-highlights]");
  select.value = "3";
  select.dispatchEvent(new Event("change"));
  await pause();
  seen.highlighted = byId("fig-training").data.map((line, i) => line.opacity === 1 ? i : -1).filter(i => i >= 0);

  const press = async (id, button) => {
    const target = byId(id).querySelectorAll("g.updatemenu-button")[button];
    target.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    await pause();
  };
  await press("fig-layers", 1);
  seen.weight = [byId("fig-layers").data[0].y[0], byId("fig-layers").layout.yaxis.title.text];
  await press("fig-surface-0", 1);
  seen.tops = [byId("fig-surface-0").layout.scene.zaxis.range[1], byId("fig-surface-0").layout.scene2.zaxis.range[1]];

  const fold = document.querySelector("details.lazy");
  seen.folded = fold.querySelectorAll(".main-svg").length;
  fold.open = true;
  await pause(); await pause(); await pause();
  seen.opened = fold.querySelectorAll(".js-plotly-plot .main-svg").length > 0;
  fold.open = false;
  await pause();
  seen.closed = fold.querySelectorAll(".main-svg").length;
  root.dataset.seen = JSON.stringify(seen);
})();
</script></body>
"""


def test_browser_controls_do_what_they_say(browser, make_report, tmp_path):
    report = make_report(num_blocks=5, num_records=5)
    page = write_page(report, tmp_path / "report.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", CLICKS), encoding="utf-8")
    (root,) = re.findall(r"<html[^>]*>", dump_dom(browser, page, tmp_path / "profile"))[:1]
    assert "data-errors" not in root, root
    seen = json.loads(html.unescape(re.findall(r'data-seen="([^"]*)"', root)[0]))
    record = report["activations"][0]
    assert seen.pop("tops") == [max(map(max, record[side]["surface"])) for side in ("before", "after")]
    assert seen == {
        "descending": True,
        "ascending": True,
        "filtered": 5,
        "highlighted": [3],
        "weight": [report["layers"][0]["weight_error"], "Relative weight error"],
        "folded": 0,
        "opened": True,
        "closed": 0,
    }
