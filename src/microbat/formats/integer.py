"""Integer formats: INT8 and INT4 with one floating-point scale a row (channel or token), INT4 in groups of 32; two and three bits
with an offset besides: code * scale + offset, codes from 0, in groups of 128 or 64 along K (GPTQ's asymmetric grid).

With one scale a row on both sides a product is a sum of integers and two multiplications at its end; so W8A8 and W4A8 run on
accelerators without small floats (openPangu on Atlas A2, arXiv 2512.23367), and here on CPUs (``runtime.packed``).
"""

from microbat.formats.block import BlockFormat, Level, Term
from microbat.formats.element import BF16, FP32, INT4, INT8, listed

INT8_ROW = BlockFormat(name="int8", element=INT8, levels=(Level(group="row", element=FP32),))
INT4_ROW = BlockFormat(name="int4_row", element=INT4, levels=(Level(group="row", element=FP32),))
INT4_GROUP = BlockFormat(name="int4", element=INT4, levels=(Level(group=32, element=BF16),))


def _offset(name: str, bits: int, group: int) -> BlockFormat:
    count = 1 << bits
    codes, ones = listed(f"uint{bits}", tuple(map(float, range(count)))), listed("one", (1.0,) * count)
    levels = (Level(group=group, element=BF16),)
    return BlockFormat(name=name, element=codes, levels=levels, terms=(Term(factor=ones, element=BF16),))


INT2 = _offset("int2", 2, 128)
INT2_G64 = _offset("int2_g64", 2, 64)
INT3 = _offset("int3", 3, 128)
INT3_G64 = _offset("int3_g64", 3, 64)
