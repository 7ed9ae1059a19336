"""Scale rules: which scale a block gets, from its largest magnitude. Each rule is a function of tensors.

For power-of-two scales (E8M0), with amax = m * 2**p, 1 <= m < 2, and an element of largest value M = m_max * 2**emax:

========  ==========================================  ==========================================================
rule      exponent                                    who
========  ==========================================  ==========================================================
floor     p - emax                                    OCP MX v1.0 sec. 6.3, microxcaling, the paper's simulator
even      floor rule on amax rounded to the element's  compressed-tensors, vLLM, torchao EVEN, Quark
          mantissa width (half away from zero)
rceil     ceil(log2(amax / M))                        cuBLAS, Transformer Engine: no value ever saturates
ceil      ceil(log2 amax) - emax                      torchao CEIL
mse       floor or floor + 1, whichever has the       per-block search; a tie takes the smaller scale
          smaller squared error in its block
========  ==========================================  ==========================================================

Scales that are no powers of two (NVFP4, INT) have one rule, ``absmax``: amax / M rounded to the scale's format.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.formats.element import E2M1, FLOAT32_BIAS, FLOAT32_MANTISSA_BITS, Element, exponent_of

MANTISSA_MASK = (1 << FLOAT32_MANTISSA_BITS) - 1


def floor(amax: Tensor, element: Element) -> Tensor:
    return exponent_of(amax) - element.emax


def even(amax: Tensor, element: Element) -> Tensor:
    significant = element.mantissa_bits - 1 if element.is_fixed_point else element.mantissa_bits
    half_step = 1 << (FLOAT32_MANTISSA_BITS - significant - 1)
    bits = amax.view(torch.int32) + half_step
    return (bits >> FLOAT32_MANTISSA_BITS) - FLOAT32_BIAS - element.emax


def rceil(amax: Tensor, element: Element) -> Tensor:
    largest = int((2 * math.frexp(element.max)[0] - 1) * (1 << FLOAT32_MANTISSA_BITS))  # mantissa bits of element.max
    mantissa = amax.view(torch.int32) & MANTISSA_MASK
    return floor(amax, element) + (mantissa > largest).to(torch.int32)


def ceil(amax: Tensor, element: Element) -> Tensor:
    mantissa = amax.view(torch.int32) & MANTISSA_MASK
    return floor(amax, element) + (mantissa > 0).to(torch.int32)


POWER_OF_TWO_RULES: dict[str, Callable[[Tensor, Element], Tensor]] = {
    "floor": floor,
    "even": even,
    "rceil": rceil,
    "ceil": ceil,
}
SCALE_RULES = (*POWER_OF_TWO_RULES, "mse", "absmax")


def rules_for(format: BlockFormat) -> tuple[str, ...]:
    """The names of the rules that ``format`` can be used with."""
    return (*POWER_OF_TWO_RULES, "mse") if format.scale_element.is_power_of_two else ("absmax",)


def default_rule(format: BlockFormat) -> str:
    """The rule that serves best: ``even`` for MXFP4 (within 1 % of the per-block optimum, and what engines compute for
    activations), ``rceil`` where precision is ample and saturation is the larger error."""
    if not format.scale_element.is_power_of_two:
        return "absmax"
    return "even" if format.element == E2M1 else "rceil"
