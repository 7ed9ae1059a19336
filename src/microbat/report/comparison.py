"""The page of a comparison: quality by method and scheme, the last step, ablations, activations, time, recipes.

The views are those of BATQuant (arXiv:2603.16590): Figures 1 and 4, Tables 6 and 7, Figures 6 and 7 with Table 4,
Figures 8 to 11.
"""

from __future__ import annotations

import os
from pathlib import Path

from microbat.report import comparison_figures as figures
from microbat.report import distributions
from microbat.report.cases import case_studies
from microbat.report.comparison_figures import value_text
from microbat.report.page import frame, plotly_script, write
from microbat.report.sections import activation_plots, figure_html, section, tree
from microbat.report.text import DASH, escape, extent, fixed, percent, remarks

LINKS = (
    ("quality", "Quality"),
    ("benchmarks", "Benchmarks"),
    ("cases", "Case studies"),
    ("last-step", "Last step"),
    ("ablations", "Ablations"),
    ("activations", "Activations"),
    ("time", "Time"),
    ("recipes", "Recipes"),
    ("failures", "Failures"),
)
BEST = {
    "ratio": "has the lowest perplexity, {} times the float model's.",
    "recovery": "has the highest recovery, {} % of the float model's scores.",
}
TIED = "≈"  # before a number that is not distinguishable from the best of its scheme
HOW_ERRORS = (
    "± is the standard deviation over seeds where a method ran with several, otherwise the standard error over the "
    f"windows of the text (over the items of benchmarks). Bold is the best of its scheme; {TIED} marks what is not "
    "distinguishable from the best: within twice the noise of windows and seeds together. One seed shows no noise of seeds."
)


def write_comparison(content: dict, activations: list[dict], cases: list[dict], path: Path) -> Path:
    """Write the page of a comparison: ``content`` as in comparison.json, ``activations`` of one layer by method, ``cases`` as
    :func:`case_studies` takes them."""
    return write(render(content, activations, cases, plotly_script()), path)


def render(content: dict, activations: list[dict], cases: list[dict], plotly: str) -> str:
    """The page as text, around the given source of plotly.js."""
    main = next((group["entries"] for group in content["groups"] if not group["title"]), [])
    body = "".join(
        (
            _headline(main),
            _quality(content, main),
            _benchmarks(content, main),
            case_studies(cases),
            _last_step(main),
            _ablations([group for group in content["groups"] if group["title"]]),
            _activations(activations),
            _time(main),
            _recipes(content["groups"]),
            _failures(content["groups"]),
        )
    )
    return frame(content["title"], content["model"], LINKS, body, content["microbat"], plotly)


def verdict(entries: list[dict]) -> list[str]:
    """A sentence or two for each scheme: which method is best, and which cannot be told from it."""
    metrics = figures.present(entries)
    sentences = []
    for scheme, own in _by_scheme(entries).items():
        key = metrics[0].key if metrics else ""
        best = next((entry for entry in own if entry["standing"].get(key) == "best"), None)
        if best is None:
            sentences.append(f"{scheme}: nothing was measured.")
            continue
        text = f"{scheme}: {best['label']} {BEST[key].format(value_text(best[key], metrics[0].decimals))}"
        tied = [entry["label"] for entry in own if entry["standing"].get(key) == "tied"]
        sentences.append(text + (f" Not distinguishable from it: {', '.join(tied)}." if tied else ""))
    return sentences


def _headline(entries: list[dict]) -> str:
    return f'<p class="verdict" id="verdict">{"<br>".join(escape(sentence) for sentence in verdict(entries))}</p>'


def _quality(content: dict, entries: list[dict]) -> str:
    evaluation, text = content["evaluation"], content["calibration"]
    on = f"{evaluation['text']}, {extent(evaluation)}" if evaluation else "benchmarks alone"
    how = (
        f"Measured on {on}, the same for all; calibrated on {text['samples']} sequences of {text['length']} tokens "
        f"({text['source']}). Lower is better for perplexity and KL divergence, higher for top-1 agreement and recovery. "
        f"{HOW_ERRORS}"
    )
    if any("flips" in entry for entry in entries):
        how += " Flips: of a hundred items, how many score otherwise than the float model's."
    figure = figures.bars(entries)
    tables = "".join(f"<h3>{escape(scheme)}</h3>{_table(own, content)}" for scheme, own in _by_scheme(entries).items())
    return section("quality", "Quality by method and scheme", how, _drawn("fig-quality", figure) + tables)


def _table(entries: list[dict], content: dict | None = None) -> str:
    """One scheme's methods; with ``content``, the float model as the first row."""
    scored = any("recovery" in entry for entry in entries)
    on_text = any("ratio" in entry for entry in entries)
    heads = [
        "Method",
        *(["Perplexity", "× float", "KL", "Top-1"] if on_text else []),
        *(["Recovery %", "Flips %"] if scored else []),
        "± over",
        "Bits",
        "Minutes",
    ]
    head = "".join(f"<th{'' if not n else ' class=n'}>{name}</th>" for n, name in enumerate(heads))
    rows = []
    if content:
        own, cells = content["evaluation"], []
        if on_text:
            cells = [value_text({"value": own["perplexity"], "error": own["perplexity_stderr"]}, 2), "1", "0", "100%"]
        cells += [*(["100", "0"] if scored else []), "windows" if on_text else "items", "16", DASH]
        rows.append(f"<tr><td>float</td>{''.join(f'<td class=n>{escape(cell)}</td>' for cell in cells)}</tr>")
    rows += [_row(entry, on_text, scored) for entry in entries]
    return (
        f'<div class="scroll dense"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _row(entry: dict, on_text: bool, scored: bool) -> str:
    if not {"ratio", "recovery"} & set(entry):
        return f"<tr><td>{escape(entry['label'])}</td><td colspan=9>failed: {escape(_reason(entry))}</td></tr>"
    cells = []
    if on_text:
        top1 = {key: 100 * value if key != "over" and value else value for key, value in entry["top1"].items()}
        cells = [
            _cell(value_text(entry["perplexity"], 2)),
            _cell(value_text(entry["ratio"], 3), entry["standing"]["ratio"]),
            _cell(value_text(entry["kl"], 4), entry["standing"]["kl"]),
            _cell(value_text(top1, 1, "%")),
        ]
    if scored:
        cells.append(_cell(value_text(entry.get("recovery"), 2), entry["standing"].get("recovery", "")))
        cells.append(_cell(value_text(entry.get("flips"), 2)))
    over = (entry["ratio"] if on_text else entry.get("recovery", {})).get("over", "")
    cells += [
        _cell(f"{len(entry['seeds'])} seeds" if over == "seeds" else over),
        _cell(fixed(entry["bits_per_weight"], 2)),
        _cell(fixed(entry["seconds"] / 60, 1)),
    ]
    return f"<tr><td>{escape(entry['label'])}</td>{''.join(cells)}</tr>"


def _cell(text: str, standing: str = "") -> str:
    if standing == "best":
        return f'<td class="n"><b>{escape(text)}</b></td>'
    if standing == "tied":
        return f'<td class="n" title="not distinguishable from the best">{TIED} {escape(text)}</td>'
    return f'<td class="n">{escape(text)}</td>'


def _benchmarks(content: dict, entries: list[dict]) -> str:
    """Each benchmark's scores, the float model's first, and what must be known of answers in a model's own words."""
    if not content["tasks"]:
        return ""
    head = "".join(f"<th class=n>{escape(task)}</th>" for task in content["tasks"])
    tables = ""
    for scheme, own in _by_scheme(entries).items():
        scored = [("float", content["tasks"]), *((e["label"], e["tasks"]) for e in own if "tasks" in e)]
        rows = "".join(
            f"<tr><td>{escape(label)}</td>"
            + "".join(_cell(_score(tasks[task]) + remarks(tasks[task])) for task in content["tasks"])
            + "</tr>"
            for label, tasks in scored
        )
        tables += (
            f"<h3>{escape(scheme)}</h3><div class=scroll><table><thead><tr><th>Method</th>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )
    how = (
        "The scores behind recovery, which is the mean of score over float score; it has no meaning, and is left out, where "
        "the float model scores 0. Unparsed answers held nothing to judge, truncated ones ran out of tokens."
    )
    return section("benchmarks", "Benchmarks", how, tables + _by_task(content, entries))


def _score(score: dict) -> str:
    """Of 1, or in a benchmark's own points."""
    return value_text(score, 3 if score["value"] <= 1 else 2)


def _by_task(content: dict, entries: list[dict]) -> str:
    """The shares behind the scores of benchmarks that have several tasks."""
    tables = ""
    for name, reference in content["tasks"].items():
        if not reference.get("by_task"):
            continue
        head = "".join(f"<th class=n>{escape(task)}</th>" for task in reference["by_task"])
        scored = [("float", "", reference)]
        scored += [(e["label"], e["scheme"], e["tasks"][name]) for e in entries if "tasks" in e]
        rows = "".join(
            f"<tr><td>{escape(label)}</td><td>{escape(scheme)}</td>"
            + "".join(_cell(percent(own["by_task"].get(task))) for task in reference["by_task"])
            + "</tr>"
            for label, scheme, own in scored
        )
        tables += (
            f"<details><summary>{escape(name)} by task</summary><div class=scroll><table><thead><tr><th>Method</th>"
            f"<th>Scheme</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
        )
    return tables


def _last_step(entries: list[dict]) -> str:
    """Tables 6 and 7: the same transforms and clips, their weights rounded by one last step or another."""
    metrics = figures.present(entries)
    groups: dict[tuple[int, str], dict[str, dict]] = {}
    for entry in entries:
        if metrics and metrics[0].key in entry:
            groups.setdefault((entry["family"], entry["scheme"]), {}).setdefault(entry["solver"]["name"], entry)
    groups = {key: own for key, own in groups.items() if len(own) > 1}
    if not groups:
        return ""
    metric = metrics[0]
    steps = list(dict.fromkeys(step for own in groups.values() for step in own))
    head = "".join(f"<th class=n>{escape(step)}</th>" for step in steps)
    rows = []
    for (_, scheme), own in groups.items():
        cells = "".join(
            _cell(value_text(own[step][metric.key], metric.decimals), own[step]["standing_in_family"][metric.key])
            if step in own
            else _cell(DASH)
            for step in steps
        )
        spared = _cell(percent(_spared(own, metric), 0))
        rows.append(f"<tr><td>{escape(scheme)}</td><td>{escape(_stem(own))}</td>{cells}{spared}</tr>")
    table = (
        f'<div class="scroll"><table id="table-last-step"><thead><tr><th>Scheme</th><th>Transforms and clips</th>{head}'
        f"<th class=n>GPTQ spares</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    how = (
        f"{metric.name} with the same transforms and clips, by the step that rounds the weights; bold is the {metric.best} of "
        f"a row, {TIED} what is not distinguishable from it. The last column: which share of round-to-nearest's loss, "
        f"in {metric.unit}, GPTQ avoids."
    )
    return section("last-step", "The last step: GPTQ against round-to-nearest", how, table)


def _spared(own: dict[str, dict], metric: figures.Metric) -> float | None:
    if not {"rtn", "gptq"} <= set(own):
        return None
    rtn, gptq = (metric.lost(own[step][metric.key]["value"]) for step in ("rtn", "gptq"))
    return 1 - gptq / rtn if rtn > 0 else None


def _stem(own: dict[str, dict]) -> str:
    """The words that the labels of rows that differ in their last step begin with."""
    labels = [entry["label"].split() for entry in own.values()]
    stem = " ".join(os.path.commonprefix(labels)).rstrip(" +,-(")
    preparers = next(iter(own.values()))["preparers"]
    return stem or " + ".join(method["name"] for method in preparers) or "none"


def _ablations(groups: list[dict]) -> str:
    content = ""
    for index, group in enumerate(groups):
        tables = "".join(
            f"<p class=how>{escape(scheme)}</p>{_table(own)}" for scheme, own in _by_scheme(group["entries"]).items()
        )
        figure = figures.ablation(group["entries"])
        content += f"<h3>{escape(group['title'])}</h3>{_drawn(f'fig-ablation-{index}', figure)}{tables}"
    how = "One method with some of its settings varied, everything else held."
    return section("ablations", "Ablations", how, content) if content else ""


def _activations(records: list[dict]) -> str:
    if not records:
        return ""
    how = (
        f"{records[0]['layer']} under every method, on its first calibration sequences: values of the most peaked blocks "
        "and of the calmest, divided by their scale, before rounding. Dotted lines are the values that the format can "
        "hold. One hill uses the grid better than two."
    )
    content = _drawn("fig-by-method", distributions.scaled_by_method(records))
    content += activation_plots([{**record, "layer": record["label"]} for record in records], num_open=0)
    return section("activations", "One layer's activations under every method", how, content)


def _time(entries: list[dict]) -> str:
    figure = figures.cost(entries)
    machines = sorted({machine for entry in entries for machine in entry.get("machines", ())})
    how = (
        "What a run took for its blocks and for the model as a whole, mean over its seeds"
        f"{', on ' + ' and '.join(machines) if machines else ''}; the time for making calibration text, which all share, is "
        "not in it. Lower and further left is better."
    )
    return section("time", "Quality and time", how, _drawn("fig-time", figure)) if figure else ""


def _recipes(groups: list[dict]) -> str:
    """Every row's exact recipe, of its first scheme and seed."""
    folds: dict[str, str] = {}
    for group in groups:
        for entry in group["entries"]:
            name = f"{group['title']}: {entry['label']}" if group["title"] else entry["label"]
            made = {key: entry[key] for key in ("recipe", "preparers", "solver")}
            folds.setdefault(name, f"<details><summary>{escape(name)}</summary>{tree(made)}</details>")
    how = "Each row as it ran under its first scheme and seed, with every hyper-parameter."
    return section("recipes", "Recipes", how, "".join(folds.values()))


def _failures(groups: list[dict]) -> str:
    failed = [(group["title"], entry) for group in groups for entry in group["entries"] if entry["failed"]]
    items = "".join(
        f"<li>{escape(' '.join(filter(None, (title, entry['label'], entry['scheme']))))}: {escape(_reason(entry))}</li>"
        for title, entry in failed
    )
    return section("failures", "Failures", "Runs that ended in an error.", f"<ul>{items}</ul>") if items else ""


def _reason(entry: dict) -> str:
    return "; ".join(f"seed {seed}: {reason}" for seed, reason in entry["failed"].items())


def _by_scheme(entries: list[dict]) -> dict[str, list[dict]]:
    schemes = dict.fromkeys(entry["scheme"] for entry in entries)
    return {scheme: [entry for entry in entries if entry["scheme"] == scheme] for scheme in schemes}


def _drawn(name: str, figure: dict | None) -> str:
    return figure_html(name, figure) if figure else ""
