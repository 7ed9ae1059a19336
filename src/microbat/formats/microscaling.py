"""The OCP Microscaling formats (MX v1.0, blocks of 32 with an E8M0 scale) and NVFP4 (blocks of 16, E4M3 and float32)."""

from microbat.formats.block import BlockFormat, Level
from microbat.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, E8M0, FP32, MXINT8_ELEMENT, Element


def _mx(name: str, element: Element) -> BlockFormat:
    return BlockFormat(name=name, element=element, levels=(Level(group=32, element=E8M0),))


MXFP4 = _mx("mxfp4", E2M1)
MXFP6_E2M3 = _mx("mxfp6_e2m3", E2M3)
MXFP6_E3M2 = _mx("mxfp6_e3m2", E3M2)
MXFP8_E4M3 = _mx("mxfp8_e4m3", E4M3)
MXFP8_E5M2 = _mx("mxfp8_e5m2", E5M2)
MXINT8 = _mx("mxint8", MXINT8_ELEMENT)
NVFP4 = BlockFormat(
    name="nvfp4", element=E2M1, levels=(Level(group="tensor", element=FP32), Level(group=16, element=E4M3))
)
