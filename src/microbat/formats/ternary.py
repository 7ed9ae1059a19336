"""Formats whose values are sums of a few numbers of their block: ternary with an offset, and sums of signs.

``ternary`` (PT2-LLM, arXiv 2510.03267): alpha T + mu, T of -1, 0, 1, five to a byte. ``dual2`` and ``dual3`` (D2Quant, arXiv
2602.02546): r0 B0 + r1 B1 (+ r2 B2), each B a bit that means -1 or 1; symmetric, not evenly spaced, and zero is not among the
values. One set of numbers in BF16 per row and group of 128 or 64 along K; the papers have FP16.
"""

from microbat.formats.block import BlockFormat, Level, Term
from microbat.formats.element import BF16, Listed, listed

TRIT = listed("trit", (-1.0, 0.0, 1.0))
ONE = listed("one", (1.0, 1.0, 1.0))


def sign(place: int, bits: int) -> Listed:
    """The bit at ``place`` of codes of ``bits`` bits, 0 and 1 as -1 and 1."""
    return listed(f"sign{place}", tuple(float(2 * (code >> place & 1) - 1) for code in range(1 << bits)))


def _ternary(name: str, group: int) -> BlockFormat:
    levels = (Level(group=group, element=BF16),)
    return BlockFormat(name=name, element=TRIT, levels=levels, terms=(Term(factor=ONE, element=BF16),))


def _signs(name: str, bits: int, group: int) -> BlockFormat:
    first, *others = (sign(place, bits) for place in range(bits))
    terms = tuple(Term(factor=other, element=BF16) for other in others)
    return BlockFormat(name=name, element=first, levels=(Level(group=group, element=BF16),), terms=terms)


TERNARY = _ternary("ternary", 128)
TERNARY_G64 = _ternary("ternary_g64", 64)
DUAL2 = _signs("dual2", 2, 128)
DUAL2_G64 = _signs("dual2_g64", 2, 64)
DUAL3 = _signs("dual3", 3, 128)
DUAL3_G64 = _signs("dual3_g64", 3, 64)
