"""Integer formats with floating-point scales: INT8 and INT4 with one scale a row (channel or token), INT4 in groups of 32.

With one scale a row on both sides a product is a sum of integers and two multiplications at its end; so W8A8 and W4A8 run on
accelerators without small floats (openPangu on Atlas A2, arXiv 2512.23367), and here on CPUs (``runtime.packed``).
"""

from microbat.formats.block import BlockFormat, Level
from microbat.formats.element import BF16, FP32, INT4, INT8

INT8_ROW = BlockFormat(name="int8", element=INT8, levels=(Level(group="row", element=FP32),))
INT4_ROW = BlockFormat(name="int4_row", element=INT4, levels=(Level(group="row", element=FP32),))
INT4_GROUP = BlockFormat(name="int4", element=INT4, levels=(Level(group=32, element=BF16),))
