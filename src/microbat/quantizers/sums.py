"""Formats whose values are sums: a block's scale and terms, each times what the code says (``BlockFormat.terms``).

With s the numbers of a block, phi(q) what code q multiplies them with and c_j a factor of column j (1 where there are none), a
block w is stored as w_j ~ c_j s . phi(q_j). Three steps, none of which can make the squared error larger:

    (1)  numbers   (sum_j c_j^2 phi_j phi_j^T) s = sum_j c_j phi_j w_j       per row and block
    (2)  columns   c_j = |sum_i w_ij v_ij / sum_i v_ij^2|,  v = s . phi(q)   per column, over rows (for signs)
    (3)  codes     q_j = the nearest of the format's values

In turns, (1) and (3) are PT2-LLM's iterative fitting of alpha T + mu (arXiv 2510.03267) and alternating least squares for sums
of signs; with (2) between them they are D2Quant's dual-scale quantizer (arXiv 2602.02546). Where (1) is singular (a row of one
code), s moves no further than it must.
"""

# Shapes: L leading (rows), G blocks along K, B block size, M numbers of a block (its scale first), C codes.

from collections.abc import Callable

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat

CHUNK = 1 << 19  # weights times candidates that are compared at once: what a core's cache holds
SHRINKS, NORM = 80, 2.4  # of GPTQ's clip search: 1, 0.99 ... 0.21 of the range; the power of errors that it sums
ROUNDS = 50  # at most; PT2-LLM's fitting takes 14 to 17 on 512 x 128
THRESHOLD = 0.75  # of the mean magnitude: what becomes 0 at the start of a ternary fit (Ternary Weight Networks)
PROXIMAL = 1e-10  # of (1)'s trace, added to its diagonal and held to the numbers before
SMALLEST = 1e-8  # of a column's factor

Fitted = tuple[Tensor, Tensor]


def values_of(numbers: Tensor, format: BlockFormat) -> Tensor:
    """All values of blocks with ``numbers`` [..., M]: float32 [..., C], summed as ``QTensor.dequantize`` does."""
    first, *others = format.bases.to(numbers.device)
    values = first * numbers[..., :1]
    for place, factors in enumerate(others, start=1):
        values = values + factors * numbers[..., place, None]
    return values


def nearest(x_GB: Tensor, values_GC: Tensor) -> Tensor:
    """The code of the nearest value, uint8 [..., G, B]; of equally near ones the lower code."""
    values = values_GC.unbind(-1)
    codes, least = torch.zeros_like(x_GB, dtype=torch.uint8), (x_GB - values[0][..., None]).abs()
    for code, value in enumerate(values[1:], start=1):
        distance = (x_GB - value[..., None]).abs()
        codes.masked_fill_(distance < least, code)
        least = torch.minimum(least, distance)
    return codes


def chosen(codes_GB: Tensor, values_GC: Tensor) -> Tensor:
    """The values [..., G, B] of codes among those of their block."""
    return values_GC.gather(-1, codes_GB.to(torch.int64))


def stored(numbers: Tensor, format: BlockFormat) -> Tensor:
    """``numbers`` [..., M] rounded to what they are stored in; the first, a scale, made positive.

    The values of formats here are the same set with its sign and its factors turned round, so that the codes, to be chosen anew,
    lose nothing by it.
    """
    elements = [format.scale_element, *(term.element for term in format.terms)]
    numbers = torch.cat([numbers[..., :1].abs(), numbers[..., 1:]], dim=-1)
    return torch.stack([element.round(numbers[..., m]) for m, element in enumerate(elements)], dim=-1)


def numbers_of(x_LGB: Tensor, format: BlockFormat, rule: str) -> Tensor:
    """Scale and terms of every block by ``rule``, float32 [L, G, M], as they are stored."""
    if rule == "minmax":
        return stored(_minmax(x_LGB, format), format)
    if rule == "mse":
        return _clip_search(x_LGB, format)
    return stored(fit(x_LGB, format)[0], format)


def fit(x_LGB: Tensor, format: BlockFormat, rounds: int = ROUNDS) -> Fitted:
    """(1) and (3) in turns until no code changes: numbers [L, G, M] and codes [L, G, B]."""
    numbers, codes = start(x_LGB, format)
    for _ in range(rounds):
        numbers, before = solve(x_LGB, codes, numbers, format), codes
        codes = nearest(x_LGB, values_of(numbers, format))
        if torch.equal(codes, before):
            break
    return numbers, codes


def fit_columns(x_LGB: Tensor, format: BlockFormat, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """(1), (2), (3) in turns for sums of signs: numbers [L, G, M], codes [L, G, B] and the columns' factors [G, B]."""
    columns_GB = x_LGB.abs().mean(0).clamp(min=SMALLEST)
    numbers, codes = start(x_LGB, format, columns_GB)
    for _ in range(rounds):
        numbers = solve(x_LGB, codes, numbers, format, columns_GB)
        columns_GB = solve_columns(x_LGB, chosen(codes, values_of(numbers, format)), columns_GB)
        codes = nearest(x_LGB / columns_GB, values_of(numbers, format))
    return numbers, codes, columns_GB


def start(x_LGB: Tensor, format: BlockFormat, columns_GB: Tensor | None = None) -> Fitted:
    """Where a fit begins. Evenly spaced values: the whole range. Ternary: what is below a threshold is 0. Signs: those of
    what the signs before them leave, each with its own best factor; ``columns_GB`` [G, B] for these alone."""
    if format.element.max > 1:
        numbers = _minmax(x_LGB, format)
        return numbers, nearest(x_LGB, values_of(numbers, format))
    if format.bases.shape[-1] == 3:
        return _ternary(x_LGB)
    columns = torch.ones_like(x_LGB[0]) if columns_GB is None else columns_GB
    left, codes = x_LGB, torch.zeros_like(x_LGB, dtype=torch.uint8)
    energy = columns.square().sum(-1)
    found: list[Tensor] = []
    for place in range(len(format.bases)):
        bit = left >= 0
        signs = torch.where(bit, columns, -columns)
        found.append((left * signs).sum(-1).abs() / energy)
        left = left - found[-1][..., None] * signs
        codes |= bit.to(torch.uint8) << place
    return torch.stack(found, dim=-1), codes


def solve(
    x_LGB: Tensor, codes: Tensor, numbers: Tensor, format: BlockFormat, columns_GB: Tensor | None = None
) -> Tensor:
    """(1): the best numbers [L, G, M] for ``codes``, ``numbers`` being those before."""
    factors = format.bases.to(x_LGB.device).T[codes.to(torch.int64)]  # [L, G, B, M]
    factors = factors if columns_GB is None else factors * columns_GB[..., None]
    with torch.autocast(x_LGB.device.type, enabled=False):
        gram = (factors.mT @ factors).to(torch.float64)
        right = (factors.mT @ x_LGB[..., None]).to(torch.float64)[..., 0]
    return settle(gram, right, numbers)


def settle(gram: Tensor, right: Tensor, before: Tensor) -> Tensor:
    """The solution of ``gram`` s = ``right`` ([..., M, M] and [..., M], float64) that is nearest to ``before``; float32."""
    pull = PROXIMAL * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    damped = gram + pull[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    left = right - (gram @ before.to(gram.dtype)[..., None])[..., 0]
    return (before + torch.linalg.solve(damped, left)).to(torch.float32)


def solve_columns(x_LGB: Tensor, values_LGB: Tensor, columns_GB: Tensor) -> Tensor:
    """(2); a column whose values are all zero keeps its factor."""
    energy = values_LGB.square().sum(0)
    best = ((x_LGB * values_LGB).sum(0) / energy).abs().clamp(min=SMALLEST)
    return torch.where(energy > 0, best, columns_GB)


def _ternary(x_LGB: Tensor) -> Fitted:
    offset = x_LGB.mean(-1, keepdim=True)
    centred = x_LGB - offset
    kept = centred.abs() > THRESHOLD * centred.abs().mean(-1, keepdim=True)
    codes = 1 + torch.where(kept, centred.sign(), 0.0)
    scale = (centred.abs() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
    return torch.cat([scale, offset], dim=-1), codes.to(torch.uint8)


def _minmax(x_LGB: Tensor, format: BlockFormat) -> Tensor:
    """Scale and offset [L, G, 2] of evenly spaced values from the smallest to the largest; the offset a whole number of steps."""
    return _spaced(x_LGB.amin(-1).clamp(max=0), x_LGB.amax(-1).clamp(min=0), format)


def _spaced(low: Tensor, high: Tensor, format: BlockFormat) -> Tensor:
    scale = format.scale_element.round((high - low) / format.element.max)
    steps = torch.where(scale > 0, torch.round(-low / scale), 0.0)
    return torch.stack([scale, -scale * steps], dim=-1)


def _clip_search(x_LGB: Tensor, format: BlockFormat) -> Tensor:
    x_RB = x_LGB.flatten(0, -2)  # stacked matrices have one more axis
    low, high = x_RB.amin(-1, keepdim=True).clamp(max=0), x_RB.amax(-1, keepdim=True).clamp(min=0)
    share_C = 1 - torch.arange(SHRINKS, device=x_RB.device) / 100
    numbers_RCM = stored(_spaced(share_C * low, share_C * high, format), format)
    step = max(1, CHUNK // (SHRINKS * x_RB.shape[-1]))
    best = []
    for x, numbers in zip(x_RB[:, None].split(step), numbers_RCM.split(step), strict=True):
        error = _round(x, numbers, format).sub_(x).abs_().pow_(NORM).sum(-1)
        best.append(numbers[torch.arange(len(x), device=x.device), error.argmin(-1)])
    return torch.cat(best).unflatten(0, x_LGB.shape[:-1])


def _round(x_LGB: Tensor, numbers: Tensor, format: BlockFormat) -> Tensor:
    """The nearest of evenly spaced values, without a look at each; a new tensor."""
    scale, offset = numbers[..., :1], numbers[..., 1:]
    steps = ((x_LGB - offset) / scale).nan_to_num_(0.0)  # no steps where all of a block is zero
    return steps.round_().clamp_(0, format.element.max).mul_(scale).add_(offset)


Rounded = Callable[[Tensor, int], Fitted]


def lane(numbers: Tensor, columns: Tensor | None, format: BlockFormat) -> Rounded:
    """For a solver that goes column by column: of numbers [N, M] a function of (column [N], its place in the block) that gives
    codes uint8 [N] and values [N]."""
    values_CN = values_of(numbers, format).T.contiguous()

    def rounded(column: Tensor, place: int) -> Fitted:
        own = values_CN if columns is None else values_CN * columns[place]
        codes = (own - column).abs().argmin(0)
        return codes.to(torch.uint8), own.gather(0, codes[None])[0]

    return rounded
