"""Perplexity, KL divergence and agreement: laws first, then transformers and torch as oracles."""

import math
import re
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from microbat.evaluation import quality
from microbat.evaluation.quality import compare, perplexity, recovery
from microbat.evaluation.windows import windows

V, T, W = 101, 23, 5


class Table(nn.Module):
    """A bigram model: logits of the next token by the last one."""

    def __init__(self, logits_VV):
        super().__init__()
        self.logits_VV = nn.Parameter(logits_VV)

    def forward(self, input_ids, use_cache):
        assert not use_cache
        assert not self.training
        return SimpleNamespace(logits=self.logits_VV[input_ids])


def table(seed, scale=1.0, size=V):
    return Table(scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def tokens():
    return torch.randint(V, (W * T,), generator=torch.Generator().manual_seed(11))


@pytest.fixture(params=[1, 3 * V, 2**24], ids=["row by row", "3 rows", "whole"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(quality, "CHUNK", request.param)


def llama(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def test_uniform_logits_have_the_perplexity_of_the_vocabulary(tokens, chunk):
    result = perplexity(Table(torch.full((V, V), 3.7)), windows(tokens, T), progress=False)
    assert result.value == pytest.approx(V, rel=1e-6)
    assert result.stderr == pytest.approx(0, abs=1e-4)
    assert (result.tokens, result.windows, result.window, result.stride) == (W * (T - 1), W, T, T)


def test_perplexity_equals_transformers_own_loss(tokens):
    model, cut = llama(0), windows(tokens, T)
    with torch.no_grad():
        losses = [model(**inputs, labels=inputs["input_ids"]).loss.item() for inputs, _ in cut]
    result = perplexity(model, cut, progress=False)
    assert result.nll == pytest.approx(sum(losses) / W, abs=1e-5)
    assert result.value == pytest.approx(math.exp(sum(losses) / W), rel=1e-5)
    spread = torch.tensor(losses).std().item() / math.sqrt(W)
    assert result.stderr == pytest.approx(result.value * spread, rel=1e-3)


def test_overlapping_windows_of_a_bigram_model_add_up_to_one_pass(tokens):
    # Its predictions do not depend on earlier tokens, so any windows must give what one window over all of them gives.
    model, length = table(1), 2 * T + 1
    whole = perplexity(model, windows(tokens[:length], length), progress=False)
    parts = perplexity(model, windows(tokens[:length], T, stride=8), progress=False)
    num_predictions = T - 1 + 3 * 8
    assert parts.tokens == num_predictions == whole.tokens
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)


def test_a_model_equals_itself(tokens):
    model = llama(0)
    rows = compare({"float": model, "same": llama(0)}, "float", windows(tokens, T), progress=False).rows
    for row in rows:
        assert (row.kl, row.top1, row.ratio) == (0.0, 1.0, 1.0)
        assert (row.kl_stderr, row.top1_stderr, row.ratio_stderr) == (0.0, 0.0, 0.0)


def test_rows_against_torch_kl_div(tokens, chunk):
    base, other, cut = table(1), table(2, scale=0.5), windows(tokens, T)
    result = compare({"other": other, "base": base}, "base", cut, progress=False)
    assert [row.name for row in result.rows] == ["other", "base"]
    assert (result.reference, result.tokens, result.windows, result.window, result.stride) == ("base", W * 22, W, T, T)
    row = result.rows[0]

    logp, logq = (model.logits_VV[cut.tokens_WT[:, :-1]].double().log_softmax(-1) for model in (base, other))
    kl_W = F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1).mean(-1)
    nll_W, base_W = (-log.gather(-1, cut.tokens_WT[:, 1:, None]).squeeze(-1).mean(-1) for log in (logq, logp))
    top1_W = (logp.argmax(-1) == logq.argmax(-1)).double().mean(-1)
    expected = {"kl": kl_W, "top1": top1_W}
    for name, values in expected.items():
        assert getattr(row, name) == pytest.approx(values.mean().item(), rel=1e-5)
        assert getattr(row, f"{name}_stderr") == pytest.approx(values.std().item() / math.sqrt(W), rel=1e-4)
    assert row.window_nll == pytest.approx(nll_W.tolist(), rel=1e-5)
    assert row.window_kl == pytest.approx(kl_W.tolist(), rel=1e-5)
    assert row.perplexity == pytest.approx(nll_W.mean().exp().item(), rel=1e-5)
    assert row.ratio == pytest.approx((nll_W - base_W).mean().exp().item(), rel=1e-5)
    paired = (nll_W - base_W).std().item() / math.sqrt(W)
    assert row.ratio_stderr == pytest.approx(row.ratio * paired, rel=1e-4)
    assert row.perplexity == pytest.approx(perplexity(other, cut, progress=False).value, rel=1e-6)


@pytest.mark.parametrize("noise", [1e-7, 1e-4, 1e-2, 1.0, 30.0])
def test_kl_is_never_negative_and_grows_with_the_distance(tokens, noise):
    base = table(1)
    near, far = (Table(base.logits_VV.detach() + factor * table(2).logits_VV.detach()) for factor in (noise, 3 * noise))
    rows = compare({"base": base, "near": near, "far": far}, "base", windows(tokens, T), progress=False).rows
    assert 0 <= rows[1].kl <= rows[2].kl + 1e-7


def test_loaders_give_the_rows_of_modules_and_come_one_at_a_time(tokens):
    import weakref

    models = OrderedDict(base=table(1), one=table(2), two=table(3))
    cut, alive = windows(tokens, T), []

    def loader(name):
        def load():
            assert not any(reference() is not None for reference in alive)
            model = Table(models[name].logits_VV.detach().clone())
            alive.append(weakref.ref(model))
            return model

        return load

    expected = compare(models, "base", cut, progress=False)
    assert (
        compare({"base": models["base"], "one": loader("one"), "two": loader("two")}, "base", cut, progress=False)
        == expected
    )
    mixed = {"base": lambda: models["base"], "one": loader("one"), "two": models["two"]}
    assert compare(mixed, "base", cut, progress=False) == expected
    assert len(alive) == 3


def test_a_single_window_has_no_standard_error_and_the_bar_goes_to_stderr(tokens, capsys):
    cut = windows(tokens, T, limit=1)
    assert perplexity(table(1), cut).stderr is None
    row = compare({"base": table(1), "other": table(2)}, "base", cut).rows[1]
    assert (row.kl_stderr, row.top1_stderr, row.ratio_stderr, row.perplexity_stderr) == (None,) * 4
    assert capsys.readouterr().out == ""


def test_modes_of_the_modules_are_as_before(tokens):
    model = nn.Sequential(table(1))
    model.forward = lambda **inputs: model[0](**inputs)
    model.train()
    perplexity(model, windows(tokens, T), progress=False)
    assert model.training
    assert model[0].training


def test_logits_that_are_not_numbers_name_model_and_window(tokens):
    broken = table(2)
    with torch.no_grad():
        broken.logits_VV[tokens[2 * T], 5] = torch.nan
    cut = windows(tokens, T)
    index = next(i for i, row in enumerate(cut.tokens_WT) if (row[:-1] == tokens[2 * T]).any())
    with pytest.raises(FloatingPointError, match=f"'broken' gives NaN or infinite logits in window {index}"):
        compare({"base": table(1), "broken": broken}, "base", cut, progress=False)


def test_unlike_vocabularies_and_an_unknown_reference_are_refused(tokens):
    cut = windows(tokens % 90, T)
    with pytest.raises(ValueError, match="'small' has a vocabulary of 97, the reference one of 101"):
        compare({"base": table(1), "small": table(1, size=97)}, "base", cut, progress=False)
    with pytest.raises(KeyError, match="'flaot' is not among the models"):
        compare({"float": table(1)}, "flaot", cut, progress=False)


# BATQuant, arXiv 2603.16590: benchmark scores, and the recovery that the paper prints behind them.
TABLE_2 = {"BF16": (2377, 906, 95.81, 70.98, 73.98)}  # MME, OCRBench, DocVQA, RealWorldQA, VLMBlind
TABLE_3 = {"BF16": (95.15, 96.87, 71.46, 63.12, 58.13)}  # GSM8K, MATH-500, AIME24, AIME25, GPQA-D
TABLE_5 = {"BF16": (56.48, 81.06, 74.96, 77.69, 68.03)}  # ARC-C, ARC-E, HellaSwag, PIQA, Winogrande


@pytest.mark.parametrize(
    ("table_rows", "scores", "printed"),
    [
        (TABLE_2, (2243, 838, 92.70, 65.23, 66.47), 93.07),  # W4A4KV16 RTN
        (TABLE_2, (2360, 864, 94.31, 67.32, 69.70), 96.43),  # W4A4KV16 BATQuant
        (TABLE_3, (93.10, 94.53, 53.33, 47.08, 49.80), 86.06),  # W4A4KV16 RTN
        (TABLE_3, (94.77, 95.60, 62.08, 52.92, 54.19), 92.45),  # W4A4KV16 BATQuant
        (TABLE_5, (52.47, 76.89, 70.44, 74.16, 64.80), 94.49),  # W4A4KV16 RTN
        (TABLE_5, (53.33, 77.53, 71.12, 75.30, 66.22), 95.84),  # W4A4KV16 BATQuant
    ],
)
def test_recovery_reproduces_the_papers_tables(table_rows, scores, printed):
    names = "abcde"
    value = recovery(dict(zip(names, scores, strict=True)), dict(zip(names, table_rows["BF16"], strict=True)))
    assert value == pytest.approx(printed, abs=0.0051)


def test_recovery_reproduces_every_row_of_the_papers_tables(shared):
    text = (shared / "papers" / "batquant.txt").read_text(encoding="utf-8")
    off = {}
    for table in (2, 3, 5):
        lines = text.partition(f"\nTable {table}: ")[2].partition("\n\n")[0].splitlines()[2:]
        rows = [[float(word) for word in line.split() if re.fullmatch(r"[0-9.]+", word)] for line in lines]
        assert [len(rows), rows[0][-1]] == [33, 100.0]  # BF16, then eight methods under each of four schemes
        base, *others = (dict(zip("abcde", row, strict=False)) for row in rows)
        for line, row, scores in zip(lines[1:], rows[1:], others, strict=True):
            if recovery(scores, base) != pytest.approx(row[-1], abs=0.0151):
                off[line] = recovery(scores, base)
    assert off == {  # what the printed scores of these three rows give; the paper has 90.74, 93.26 and 92.56
        "BRQ 2147 805 92.94 66.14 62.14 90.74": pytest.approx(90.67, abs=0.005),
        "BRQ 93.71 95.80 63.96 53.33 55.40 72.39 93.26": pytest.approx(93.34, abs=0.005),
        "SpinQuant 94.47 95.47 59.38 53.96 55.86 71.87 92.56": pytest.approx(92.50, abs=0.005),
    }


def test_recovery_refuses_what_has_no_meaning():
    with pytest.raises(ValueError, match="only on one side: boolq"):
        recovery({"piqa": 0.7}, {"piqa": 0.7, "boolq": 0.6})
    with pytest.raises(ValueError, match="none at all"):
        recovery({}, {})
    with pytest.raises(ValueError, match="float score is 0: aime"):
        recovery({"aime": 0.0}, {"aime": 0.0})
