"""Scalar number formats as values: everything about a format is derived from a few integers.

An element is a sign-magnitude floating-point format (OCP MX v1.0, section 5.3) or a two's complement fixed-point
one (``exponent_bits == 0``). Rounding is to nearest, ties to even unless the format says away from zero, saturating at the
largest finite magnitude. A format whose codes are laid out otherwise is a class of its own (``formats.hifloat``).
Exponents come from the bits of the float32 value, never from ``log2``, so that they are right for every input.
"""

# Shape suffixes: none; every function here is elementwise.

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

FLOAT32_MANTISSA_BITS = 23
FLOAT32_BIAS = 127
EXPONENT_MASK = 0x7F800000


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent as float32 for int32 exponents in [-127, 127]; -127 is the subnormal that E8M0 code 0 means."""
    normal = (exponent + FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS
    return torch.where(exponent <= -FLOAT32_BIAS, 1 << (FLOAT32_MANTISSA_BITS - 1), normal).view(torch.float32)


def round_away(x: Tensor) -> Tensor:
    """Nearest integer of ``x`` >= 0, ties up. Not floor(x + 0.5): that sum may itself round up, from just below a tie."""
    whole = x.trunc()
    return whole + (x - whole >= 0.5)


def exponent_of(x: Tensor) -> Tensor:
    """floor(log2|x|) as int32 for float32 ``x``, from the bits; -127 for zeros and subnormals, 128 for Inf and NaN."""
    bits = x.view(torch.int32) & 0x7FFFFFFF
    return (bits >> FLOAT32_MANTISSA_BITS) - FLOAT32_BIAS


@dataclass(frozen=True, kw_only=True)
class Element:
    """One scalar format.

    ``bias`` is the exponent bias; for fixed point (``exponent_bits == 0``) it is the number of fraction bits, so the
    step is ``2**-bias``. ``specials`` says which codes are no numbers: ``none``; ``nan``, the all-ones code alone
    (E4M3, E8M0); ``ieee``, the whole top binade (E5M2, bfloat16, float32). Without ``subnormals`` there is no zero either:
    the lowest field is a binade like the others (E8M0, E6M2). Two's complement formats leave their most negative code
    unused, so that the grid is symmetric.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    signed: bool = True
    specials: Literal["none", "nan", "ieee"] = "none"
    subnormals: bool = True
    ties: Literal["even", "away"] = "even"

    @property
    def is_fixed_point(self) -> bool:
        return self.exponent_bits == 0

    @property
    def is_power_of_two(self) -> bool:
        """Every value is a power of two (E8M0): multiplying by it is exact."""
        return self.mantissa_bits == 0 and not self.signed

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def is_trit(self) -> bool:
        """Whether five codes are packed into a byte."""
        return False

    def packed_bits(self, width: int) -> int:
        """Bits of a row of ``width`` packed codes."""
        return 8 * -(-width // 5) if self.is_trit else self.bits * width

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number; for fixed point, of the whole range."""
        if self.is_fixed_point:
            return self.mantissa_bits - self.bias
        return 1 - self.bias if self.subnormals else -self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite number."""
        if self.is_fixed_point:
            return self.mantissa_bits - self.bias - 1
        top = (1 << self.exponent_bits) - 1 - self.bias
        only_special_in_binade = self.specials == "nan" and self.mantissa_bits == 0
        return top - 1 if self.specials == "ieee" or only_special_in_binade else top

    @property
    def home(self) -> int:
        """The exponent that the largest magnitude of a block belongs in: that of the largest number, unless precision falls
        off before it."""
        return self.emax

    @property
    def max(self) -> float:
        if self.is_fixed_point:
            return self._max_code * 2.0**-self.bias
        steps = (2 << self.mantissa_bits) - 1
        if self.specials == "nan" and self.mantissa_bits > 0:
            steps -= 1
        return steps * 2.0 ** (self.emax - self.mantissa_bits)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value."""
        if self.is_fixed_point:
            return 2.0**-self.bias
        return 2.0 ** (self.emin - self.mantissa_bits)

    def round(self, x: Tensor) -> Tensor:
        """Nearest value of the format (float32 in, float32 out), saturating; NaN stays NaN."""
        if self.mantissa_bits == FLOAT32_MANTISSA_BITS:
            return x
        if self.exponent_bits == 8:  # the range of float32 itself: bfloat16, by the bits, as torch.compile drops casts
            bits = x.view(torch.int32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            return torch.where(x.isnan(), x, nearest.view(torch.float32))
        if self.is_fixed_point:
            return torch.round(x * 2.0**self.bias).clamp(-self._max_code, self._max_code) * 2.0**-self.bias
        # Adding and taking away 2**(e + 23 - mantissa_bits), e the exponent of x, leaves float32 room for exactly
        # mantissa_bits below it: the hardware's own rounding to nearest even does the work.
        magnitude = x.abs().clamp(min=None if self.subnormals else 2.0**self.emin, max=self.max)
        binade = (magnitude.view(torch.int32) & EXPONENT_MASK).clamp(
            min=(self.emin + FLOAT32_BIAS) << FLOAT32_MANTISSA_BITS
        )
        if self.ties == "away":
            step = (binade - (self.mantissa_bits << FLOAT32_MANTISSA_BITS)).view(torch.float32)
            return (round_away(magnitude / step) * step).clamp(max=self.max).copysign(x)
        room = (FLOAT32_MANTISSA_BITS - self.mantissa_bits) << FLOAT32_MANTISSA_BITS
        shift = (binade + room).view(torch.float32)
        return ((magnitude + shift) - shift).copysign(x)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of values that are on the grid already (as :meth:`round` returns); formats of up to 8 bits."""
        if self.is_fixed_point:
            return (x * 2.0**self.bias).to(torch.int32).bitwise_and((1 << self.bits) - 1).to(torch.uint8)
        bits = x.abs().view(torch.int32)
        first_field = 1 if self.subnormals else 0  # of the smallest normal number
        shifted_exponent = (FLOAT32_BIAS + self.emin - first_field) << self.mantissa_bits
        normal = (bits >> (FLOAT32_MANTISSA_BITS - self.mantissa_bits)) - shifted_exponent
        subnormal = (x.abs() * 2.0 ** (self.mantissa_bits - self.emin)).to(torch.int32)
        code = torch.where(x.abs() < 2.0**self.emin, subnormal, normal)
        sign = torch.signbit(x).to(torch.int32) << (self.bits - 1) if self.signed else 0
        if self.specials != "none":
            code = torch.where(x.isnan(), self._nan_code, code)
        return (code | sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 values of uint8 codes."""
        return self.table.to(codes.device)[codes.to(torch.int32)]

    @property
    def _max_code(self) -> int:
        return (1 << self.mantissa_bits) - 1

    @property
    def _nan_code(self) -> int:
        return (1 << (self.bits - int(self.signed))) - 1

    @cached_property
    def table(self) -> Tensor:
        """float32 [2**bits]: the value of every code (NaN and Inf where the code means that)."""
        return torch.tensor([self._value(code) for code in range(1 << self.bits)], dtype=torch.float32)

    @cached_property
    def grid(self) -> Tensor:
        """float32, ascending: the finite non-negative values."""
        values = self.table[torch.isfinite(self.table) & ~torch.signbit(self.table)]
        return values.unique()

    def _value(self, code: int) -> float:
        if self.is_fixed_point:
            signed = code - (1 << self.bits) if self.signed and code >> (self.bits - 1) else code
            return signed * 2.0**-self.bias
        magnitude_bits = self.bits - int(self.signed)
        sign = -1.0 if self.signed and code >> magnitude_bits else 1.0
        magnitude = code & ((1 << magnitude_bits) - 1)
        field, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        if self.specials == "nan" and magnitude == self._nan_code:
            return float("nan")
        if self.specials == "ieee" and field == (1 << self.exponent_bits) - 1:
            return sign * float("inf") if mantissa == 0 else float("nan")
        if field == 0 and self.subnormals:
            return sign * mantissa * self.min_subnormal
        return sign * (1 + mantissa / (1 << self.mantissa_bits)) * 2.0 ** (field - self.bias)


@dataclass(frozen=True, kw_only=True)
class Listed(Element):
    """Codes 0, 1, 2 ... that mean ``values``, in any order: what a block's numbers are multiplied with, and rounded to only
    together with them (``quantizers.sums``). Three values are packed five codes a byte, 1.6 bits each."""

    values: tuple[float, ...]

    @property
    def max(self) -> float:
        return max(abs(value) for value in self.values)

    @property
    def is_trit(self) -> bool:
        return len(self.values) == 3

    def _value(self, code: int) -> float:
        return self.values[code] if code < len(self.values) else float("nan")


def listed(name: str, values: tuple[float, ...]) -> Listed:
    """The element whose codes mean ``values``, in as few bits as these take."""
    bits = (len(values) - 1).bit_length()
    return Listed(name=name, exponent_bits=0, mantissa_bits=bits, bias=0, signed=False, values=values)


E2M1 = Element(name="e2m1", exponent_bits=2, mantissa_bits=1, bias=1)
E2M3 = Element(name="e2m3", exponent_bits=2, mantissa_bits=3, bias=1)
E3M2 = Element(name="e3m2", exponent_bits=3, mantissa_bits=2, bias=3)
E4M3 = Element(name="e4m3", exponent_bits=4, mantissa_bits=3, bias=7, specials="nan")
E5M2 = Element(name="e5m2", exponent_bits=5, mantissa_bits=2, bias=15, specials="ieee")
INT4 = Element(name="int4", exponent_bits=0, mantissa_bits=3, bias=0)
INT8 = Element(name="int8", exponent_bits=0, mantissa_bits=7, bias=0)
MXINT8_ELEMENT = Element(name="mxint8", exponent_bits=0, mantissa_bits=7, bias=6)

E8M0 = Element(name="e8m0", exponent_bits=8, mantissa_bits=0, bias=127, signed=False, specials="nan", subnormals=False)
BF16 = Element(name="bf16", exponent_bits=8, mantissa_bits=7, bias=127, specials="ieee")
FP32 = Element(name="fp32", exponent_bits=8, mantissa_bits=23, bias=127, specials="ieee")
