"""What the run cost, said in a sentence or two."""

from __future__ import annotations

import math

from microbat.report.text import fixed, is_number, number, percent


def verdict(report: dict) -> str:
    """One sentence or two in plain text: what it cost, and what round-to-nearest would have cost."""
    label = _label(report)
    bits = report.get("bits_per_weight")
    at_bits = f" at {fixed(bits, 2)} bits per weight" if is_number(bits) else ""
    reference, chosen, rtn = rows_of_interest(report)
    cost = ratio(chosen, reference)
    if cost is None:
        return f"{label} quantized {report.get('model') or 'the model'}{at_bits}; its quality has not been evaluated."
    sentence = (
        f"{label} reaches perplexity {number(chosen['perplexity'])}, {fixed(cost, 2)} times the float model's "
        f"{number(reference['perplexity'])},{at_bits}."
    ).replace(",.", ".")
    if is_number(chosen.get("top1")):
        sentence += f" It agrees with the float model on the most likely token {percent(chosen['top1'])} of the time."
    rtn_cost = ratio(rtn, reference)
    if rtn is not chosen and rtn_cost is not None and rtn_cost > 1 and cost > 0:
        spared = 1 - math.log(cost) / math.log(rtn_cost)
        sentence += f" Plain round-to-nearest reaches {number(rtn['perplexity'])} ({fixed(rtn_cost, 2)} times); "
        sentence += f"{percent(spared, 0)} of that loss (in nats) is avoided." if spared > 0 else "here it loses less."
    return sentence


def rows_of_interest(report: dict) -> tuple[dict, dict, dict]:
    """The rows of the float model, of this run and of round-to-nearest; empty where there is none."""
    rows = (report.get("evaluation") or {}).get("rows") or []
    by_name = {str(row.get("name")).lower(): row for row in rows}
    steps = [str(report[key]).lower() for key in ("method", "solver") if report.get(key)]
    wanted = ["+".join(steps), " + ".join(steps), *steps[:1]]
    candidates = [by_name[name] for name in wanted if name in by_name]
    candidates += [row for name, row in by_name.items() if steps and name.startswith(steps[0])]
    others = [row for name, row in by_name.items() if name not in ("float", "rtn")]
    if len(others) == 1:  # whatever its name, it can only be this run
        candidates += others
    return by_name.get("float", {}), candidates[0] if candidates else {}, by_name.get("rtn", {})


def ratio(row: dict, reference: dict) -> float | None:
    """The perplexity of one row over that of another; None where one of them is missing."""
    ppl, base = row.get("perplexity"), reference.get("perplexity")
    return ppl / base if is_number(ppl) and is_number(base) and base > 0 else None


def _label(report: dict) -> str:
    """batquant + gptq, W4A4KV16."""
    names = [name for name in (report.get("method"), report.get("solver")) if name]
    label = " + ".join(dict.fromkeys(names)) or "microbat"
    return f"{label}, {report['scheme']}," if report.get("scheme") else label
