"""Integer formats with floating-point scales: INT8 with one scale a row (channel or token), INT4 in groups of 32."""

from microbat.formats.block import BlockFormat, Level
from microbat.formats.element import BF16, FP32, INT4, INT8

INT8_ROW = BlockFormat(name="int8", element=INT8, levels=(Level(group="row", element=FP32),))
INT4_GROUP = BlockFormat(name="int4", element=INT4, levels=(Level(group=32, element=BF16),))
