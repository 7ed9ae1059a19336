"""HiFloat: HiF8, 8 bits whose precision tapers off, and HiF4, units of 64 numbers of 4 bits with scales on three levels.

HiF8: "Ascend HiFloat8 Format for Deep Learning", arXiv 2409.16626v2. HiF4: "HiFloat4 Format for Language Model Inference",
arXiv 2602.11287v2, Algorithm 1. Both on models: "Unleashing Low-Bit Inference on Ascend NPUs", arXiv 2602.12635.

A HiF4 number is E6M2 of its unit x 2^(flag of its 8) x 2^(flag of its 4) x S1P2, S1P2 a sign and quarters from 0 to 1.75: up to
7 times the unit's scale. With V the largest magnitude of the unit, V8 of an eighth, V16 of a sixteenth of it (Algorithm 1):

    (1)  S = E6M2(bf16(V * bf16(1/7))),   R = bf16(1/S)
    (2)  flag of an eighth: V8 R >= 4;   of a sixteenth: V16 R 2^-(its eighth's) >= 2
    (3)  code = min(7, round(4 |v| R 2^-(both flags)))

Its precision in between and its ties are free. ``hif4`` is what the authors' simulators compute (products in float32, ties
away from zero), ``hif4_amct`` Huawei's AMCT (3 with its product rounded to bfloat16), ``hif4_ascend`` the golden data of the
Ascend instruction (all products rounded to bfloat16, ties to even). They differ in less than 1 % of the codes, and mean the
same by the same bits. Equal to those programs bit for bit on bfloat16 inputs; float32 ones are not rounded to bfloat16 before.

The format is not idempotent, and powers of two are not on its grid: E6M2 has no 1/7 x 2^k, so that V = 1 gives S = 0.15625 and
comes back as 0.9375, and that as 0.875.
"""

# Shapes: N rows, T rows of the other factor, K last axis, G units of 64 along K.

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat, Level, QTensor, Reciprocal, split_blocks
from microbat.formats.element import BF16, E8M0, Element, exponent_of, power_of_two, round_away


@dataclass(frozen=True, kw_only=True)
class Tapered(Element):
    """HiF8: a sign, a prefix code for the number of exponent bits D, the exponent as sign and magnitude, a mantissa.

    =======  ==  =========================  ====================  ==================================
    prefix   D   exponent E                 mantissa bits         value
    =======  ==  =========================  ====================  ==================================
    0000     0                              3                     2^(m - 23); m = 0: zero, sign: NaN
    0001     0   0                          3                     2^E (1 + m/8), and so on
    001      1   +-1                        3
    01       2   +-2, 3                     3
    10       3   +-4 to 7                   2
    11       4   +-8 to 15                  1                     0x6F and 0xEF: infinities
    =======  ==  =========================  ====================  ==================================

    Ties go away from zero. A number from 1.25 * 2^15 on is beyond the range: ``overflow`` says what becomes of it. The paper and
    the authors' simulators make it infinite (``hif8_inf``), the NPU's cast and AMCT the largest number (``hif8``). Only scales
    that are not the row's own let it happen: rules ``unit`` and ``pts``.
    """

    overflow: Literal["saturate", "infinity"] = "saturate"

    @property
    def emin(self) -> int:
        return -22

    @property
    def emax(self) -> int:
        return 15

    @property
    def home(self) -> int:
        """Up to here, and down to 2^-3, there are three mantissa bits."""
        return 3

    @property
    def max(self) -> float:
        return 2.0**15

    @property
    def min_subnormal(self) -> float:
        return 2.0**-22

    def round(self, x: Tensor) -> Tensor:
        magnitude = x.abs().clamp(max=2.0**17)
        exponent = exponent_of(magnitude).clamp(self.emin, self.emax)
        step = exponent - self.mantissa_bits
        for bound in (3, 7, 15):
            step = step + (exponent.abs() > bound).to(torch.int32)
        rounded = round_away(magnitude * power_of_two(-step)) * power_of_two(step)
        beyond = float("inf") if self.overflow == "infinity" else self.max
        return torch.where(rounded > self.max, beyond, rounded).copysign(x) + 0.0  # there is no negative zero

    def encode(self, x: Tensor) -> Tensor:
        values, codes = (part.to(x.device) for part in self._ascending)
        found = codes[torch.searchsorted(values, x.contiguous()).clamp(max=len(values) - 1)]
        return torch.where(x.isnan(), self._nan_code, found)

    @cached_property
    def _ascending(self) -> tuple[Tensor, Tensor]:
        """All numbers in ascending order, and their codes."""
        codes = torch.arange(256)[~self.table.isnan()]
        values, order = self.table[codes].sort()
        return values, codes[order].to(torch.uint8)

    @property
    def _nan_code(self) -> int:
        return 0x80

    def _value(self, code: int) -> float:
        sign, payload = (-1.0 if code & 0x80 else 1.0), code & 0x7F
        if code == self._nan_code:
            return float("nan")
        if payload == 0x6F:
            return sign * float("inf")
        if payload < 8:
            return sign * 2.0 ** (payload - 23) if payload else 0.0
        if payload < 16:
            return sign * (1 + (payload & 7) / 8)
        digits = 4 if payload >= 0x60 else 3 if payload >= 0x40 else 2 if payload >= 0x20 else 1  # of the exponent: D
        mantissa_bits = {1: 3, 2: 3, 3: 2, 4: 1}[digits]
        field = (payload >> mantissa_bits) & ((1 << digits) - 1)  # its sign, then its magnitude without the leading one
        lead = 1 << (digits - 1)
        exponent = lead | (field & (lead - 1))
        mantissa = (payload & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
        return sign * 2.0 ** (-exponent if field & lead else exponent) * (1 + mantissa)


HIF8_ELEMENT = Tapered(name="hif8", exponent_bits=4, mantissa_bits=3, bias=0, ties="away")
HIF8_TO_INFINITY = Tapered(name="hif8", exponent_bits=4, mantissa_bits=3, bias=0, ties="away", overflow="infinity")
HIF8 = BlockFormat(name="hif8", element=HIF8_ELEMENT, levels=(Level(group="row", element=E8M0),))
HIF8_INF = BlockFormat(name="hif8_inf", element=HIF8_TO_INFINITY, levels=HIF8.levels)

S1P2 = Element(name="s1p2", exponent_bits=1, mantissa_bits=2, bias=1, ties="away")
S1P2_TO_EVEN = Element(name="s1p2", exponent_bits=1, mantissa_bits=2, bias=1)
E6M2 = Element(name="e6m2", exponent_bits=6, mantissa_bits=2, bias=48, signed=False, specials="nan", subnormals=False)
DOUBLED = Element(name="e1", exponent_bits=1, mantissa_bits=0, bias=0, signed=False, subnormals=False)  # 1 or 2


def _hif4(name: str, element: Element, reciprocal: Reciprocal) -> BlockFormat:
    levels = (Level(group=64, element=E6M2), Level(group=8, element=DOUBLED), Level(group=4, element=DOUBLED))
    return BlockFormat(name=name, element=element, levels=levels, reciprocal=reciprocal)


HIF4 = _hif4("hif4", S1P2, Reciprocal(element=BF16))
HIF4_AMCT = _hif4("hif4_amct", S1P2, Reciprocal(element=BF16, rounded=BF16))
HIF4_ASCEND = _hif4("hif4_ascend", S1P2_TO_EVEN, Reciprocal(element=BF16, compared=BF16, rounded=BF16))


def integer_product(x: QTensor, weight: QTensor) -> Tensor:
    """float64 [T, N]: ``x`` [T, K] times ``weight`` [N, K] transposed, both HiF4, the way its hardware does.

    Per pair of units an integer, the sum of 64 products of quarters with their flags as left shifts, at most 50,176; and one
    multiplication by both units' scales. Exact, as long as float64 holds the sum of the units. Raises ValueError for other
    formats.
    """
    for q in (x, weight):
        if q.format.scale_element != E6M2 or q.inner is None:
            raise ValueError(f"the integer product is that of HiF4 units, not of {q.format.name}")
    a_TGB, b_NGB = (_quarters(q) for q in (x, weight))
    sums = torch.einsum("tgb,ngb->tng", a_TGB, b_NGB)  # int64: torch sums no int32 products
    scales = x.scales.to(torch.float64)[:, None] * weight.scales.to(torch.float64)[None]
    return (sums.to(torch.float64) * scales / 16).sum(-1)


def _quarters(q: QTensor) -> Tensor:
    """int64 [..., G, B]: every number in quarters of its unit's scale."""
    assert q.inner is not None
    values = split_blocks(q.format.element.decode(q.codes), q.format.block_of(q.shape[-1])) * q.format.factors(q.inner)
    return (values * 4).to(torch.int64)
