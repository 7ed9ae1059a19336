"""How well a model predicts a text, and how far it is from a reference: perplexity, KL divergence, top-1 agreement.

Means are over predictions. Standard errors treat windows as independent draws (None for a single window). An answer with its
question is a window of its own length.
"""

# Shapes: T tokens in a window, or in a question with its answer, F its predictions that count, V vocabulary.

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from microbat.evaluation.progress import bar
from microbat.evaluation.windows import Answers, Inputs, Windows

CHUNK = 2**24  # float32 elements of [rows, V] at a time: 64 MiB, whatever the vocabulary

Loader = Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """``value`` = exp(``nll``), with its ``stderr``; ``nll`` is the mean over ``tokens`` predictions, in nats."""

    value: float
    nll: float
    stderr: float | None
    tokens: int
    windows: int
    window: int | None
    stride: int | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model against the reference.

    ``ratio`` is its perplexity over the reference's, ``kl`` the mean of KL(reference || model) per prediction in nats,
    ``top1`` the share of predictions whose most likely token is the reference's. The error of ``ratio`` is that of
    the paired difference, window by window: far smaller than the errors of the two perplexities suggest.
    ``window_nll`` and ``window_kl`` are each window's means per prediction, for comparing two models with each other.
    """

    name: str
    perplexity: float
    perplexity_stderr: float | None
    ratio: float
    ratio_stderr: float | None
    kl: float
    kl_stderr: float | None
    top1: float
    top1_stderr: float | None
    window_nll: list[float]
    window_kl: list[float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows in the order in which the models were given, and what they were measured on."""

    reference: str
    rows: list[Row]
    tokens: int
    windows: int
    window: int | None
    stride: int | None
    skipped: int


@dataclass
class _Sums:
    """One model's sums over the predictions of each window."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)

    def append(self, name: str, nll: float, kl: float, top1: float) -> None:
        self.nll.append(_finite(nll, f"model {name!r}", len(self.nll)))
        self.kl.append(_finite(kl, f"model {name!r}", len(self.kl)))
        self.top1.append(top1)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Windows | Answers, *, progress: bool = True) -> Perplexity:
    """Perplexity of a causal LM on ``windows``, on the model's own device. A bar on stderr shows the time left."""
    sums: list[float] = []
    with _evaluating(model), bar("perplexity", len(windows), progress) as advance:
        for inputs, fresh in windows:
            nll = _nll(*_predictions(model, inputs, fresh))
            sums.append(_finite(nll, "the model", len(sums)))
            advance(_running(sums, windows))
    nll, stderr = _mean(sums, windows)
    return Perplexity(
        value=_exp(nll),
        nll=nll,
        stderr=_scaled(stderr, _exp(nll)),
        tokens=windows.num_predictions,
        windows=len(windows),
        window=windows.window,
        stride=windows.stride,
    )


@torch.no_grad()
def compare(
    models: Mapping[str, nn.Module | Loader], reference: str, windows: Windows | Answers, *, progress: bool = True
) -> Comparison:
    """Every model against ``models[reference]`` on the same windows.

    A model may be given as a function without arguments that loads it. Models given as modules share each window's
    reference logits. Those given as loaders come one after the other, each beside the reference alone, and the
    reference runs again for each: its log-probabilities of a whole text are too big to keep (3.2 GB for 16 windows of
    1024 at a vocabulary of 49152), so the price of a loader is one more pass of the reference.
    Errors: KeyError for a reference that is not among the models, ValueError for vocabularies that differ,
    FloatingPointError for NaN or infinite results (which model, which window).
    """
    if reference not in models:
        raise KeyError(f"reference {reference!r} is not among the models ({', '.join(models)})")
    groups = _groups(models, reference)
    base = _loaded(models[reference])
    sums: dict[str, _Sums] = {}
    steps = len(windows) * sum(1 + len(group) for group in groups)
    with _evaluating(base), bar("comparing", steps, progress) as advance:
        for group in groups:
            sums |= _compare_group(reference, base, {name: models[name] for name in group}, windows, advance)
    return Comparison(
        reference=reference,
        rows=[_row(name, sums[name], sums[reference], windows) for name in models],
        tokens=windows.num_predictions,
        windows=len(windows),
        window=windows.window,
        stride=windows.stride,
        skipped=windows.skipped,
    )


def recovery(scores: Mapping[str, float], float_scores: Mapping[str, float]) -> float:
    """Mean over benchmarks of score / float score, in per cent: the recovery rate of BATQuant's Tables 2, 3 and 5.

    Not the ratio of the two means: every benchmark weighs the same, whatever its scale (MME counts to 2800).
    """
    if set(scores) != set(float_scores) or not scores:
        odd = ", ".join(sorted(set(scores) ^ set(float_scores))) or "none at all"
        raise ValueError(f"recovery needs the same benchmarks on both sides; only on one side: {odd}")
    zero = sorted(name for name, score in float_scores.items() if score == 0)
    if zero:
        raise ValueError(f"recovery is not defined where the float score is 0: {', '.join(zero)}")
    return 100 * sum(scores[name] / float_scores[name] for name in scores) / len(scores)


def _groups(models: Mapping[str, nn.Module | Loader], reference: str) -> list[list[str]]:
    """Names that may be in memory together: all modules, then each loader alone."""
    others = [name for name in models if name != reference]
    modules = [name for name in others if isinstance(models[name], nn.Module)]
    loaders = [[name] for name in others if name not in modules]
    return [modules, *loaders] if modules or not loaders else loaders


def _compare_group(
    reference: str,
    base: nn.Module,
    others: Mapping[str, nn.Module | Loader],
    windows: Windows | Answers,
    advance: Callable[[str], None],
) -> dict[str, _Sums]:
    """Sums of the reference and of the others. What it loads is freed when it returns."""
    loaded = {name: _loaded(model) for name, model in others.items()}
    sums = {name: _Sums() for name in (reference, *loaded)}
    with _evaluating(*loaded.values()):
        for inputs, fresh in windows:
            base_FV, targets_F = _predictions(base, inputs, fresh)
            sums[reference].append(reference, _nll(base_FV, targets_F), 0.0, float(fresh))
            advance(f"{reference} {_running(sums[reference].nll, windows)}")
            for name, model in loaded.items():
                sums[name].append(name, *_against(base_FV, name, model, inputs))
                advance(f"{name} {_running(sums[name].nll, windows)}")
            del base_FV  # or it would still be held while the next window's are computed
    return sums


def _against(base_FV: Float[Tensor, "F V"], name: str, model: nn.Module, inputs: Inputs) -> tuple[float, float, float]:
    """Sums over a window's predictions: negative log-likelihood, KL and agreement. Its logits are freed on return."""
    logits_FV, targets_F = _predictions(model, inputs, base_FV.shape[0])
    if logits_FV.shape != base_FV.shape:
        raise ValueError(
            f"model {name!r} has a vocabulary of {logits_FV.shape[-1]}, the reference one of {base_FV.shape[-1]}"
        )
    return _nll(logits_FV, targets_F), *_agreement(base_FV, logits_FV)


def _predictions(model: nn.Module, inputs: Inputs, fresh: int) -> tuple[Float[Tensor, "F V"], Int[Tensor, " F"]]:
    """The logits of a window's last ``fresh`` predictions, in the model's dtype, and the tokens that came."""
    tokens_T = inputs["input_ids"][0]
    tensor = next(model.parameters(), next(model.buffers(), tokens_T))
    logits_TV = model(**{name: t.to(tensor.device) for name, t in inputs.items()}, use_cache=False).logits[0]
    return logits_TV[-1 - fresh : -1], tokens_T[-fresh:].to(logits_TV.device)


def _row_slices(logits_FV: Tensor) -> Iterator[slice]:
    """Slices of rows that hold at most ``CHUNK`` elements: softmax in float32 must not copy all of [F, V]."""
    rows = max(1, CHUNK // logits_FV.shape[-1])
    return (slice(start, start + rows) for start in range(0, logits_FV.shape[0], rows))


def _nll(logits_FV: Float[Tensor, "F V"], targets_F: Int[Tensor, " F"]) -> float:
    """Sum of -log p(target), in nats."""
    return sum(
        F.cross_entropy(logits_FV[rows].float(), targets_F[rows], reduction="sum").item()
        for rows in _row_slices(logits_FV)
    )


def _agreement(base_FV: Float[Tensor, "F V"], logits_FV: Float[Tensor, "F V"]) -> tuple[float, float]:
    """Sums over the rows of KL(base || logits) in nats, and of whether the largest logit is at the same token."""
    kl, top1 = 0.0, 0.0
    for rows in _row_slices(logits_FV):
        chunk, base = logits_FV[rows], base_FV[rows].to(logits_FV.device)
        top1 += (chunk.argmax(-1) == base.argmax(-1)).sum().item()
        logq, logp = chunk.float().log_softmax(-1), base.float().log_softmax(-1)
        kl_F = F.kl_div(logq, logp, reduction="none", log_target=True).sum(-1)
        kl += kl_F.clamp_min(0).sum(dtype=torch.float64).item()  # rounding may leave a KL of 0 at -1e-8; NaN stays NaN
    return kl, top1


def _row(name: str, sums: _Sums, base: _Sums, windows: Windows | Answers) -> Row:
    nll, nll_stderr = _mean(sums.nll, windows)
    excess, excess_stderr = _mean([a - b for a, b in zip(sums.nll, base.nll, strict=True)], windows)
    kl, kl_stderr = _mean(sums.kl, windows)
    top1, top1_stderr = _mean(sums.top1, windows)
    return Row(
        name=name,
        perplexity=_exp(nll),
        perplexity_stderr=_scaled(nll_stderr, _exp(nll)),
        ratio=_exp(excess),
        ratio_stderr=_scaled(excess_stderr, _exp(excess)),
        kl=kl,
        kl_stderr=kl_stderr,
        top1=top1,
        top1_stderr=top1_stderr,
        window_nll=_per_prediction(sums.nll, windows),
        window_kl=_per_prediction(sums.kl, windows),
    )


def _per_prediction(sums: list[float], windows: Windows | Answers) -> list[float]:
    return [value / windows.fresh(index) for index, value in enumerate(sums)]


def _mean(sums: list[float], windows: Windows | Answers) -> tuple[float, float | None]:
    """Mean per prediction over the windows so far, and its standard error.

    Windows weigh as many predictions as they count; with equal weights the error is the usual std / sqrt(W).
    """
    counts = [windows.fresh(index) for index in range(len(sums))]
    total, num = sum(counts), len(sums)
    mean = sum(sums) / total
    if num == 1:
        return mean, None
    spread = sum((value - count * mean) ** 2 for value, count in zip(sums, counts, strict=True))
    return mean, math.sqrt(spread * num / (num - 1)) / total


def _scaled(stderr: float | None, derivative: float) -> float | None:
    """The error of f(x) from that of x, to first order."""
    return None if stderr is None else stderr * derivative


def _running(sums: list[float], windows: Windows | Answers) -> str:
    return f"perplexity {_exp(_mean(sums, windows)[0]):.4g}"


def _exp(nll: float) -> float:
    """exp, infinite where a float64 cannot hold it."""
    return math.exp(nll) if nll < 709 else math.inf


def _finite(value: float, model: str, index: int) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"{model} gives NaN or infinite logits in window {index}")
    return value


def _loaded(model: nn.Module | Loader) -> nn.Module:
    return model if isinstance(model, nn.Module) else model()


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside (no dropout), every module's own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
