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

An element whose precision tapers off (HiF8) wants its numbers around 1, not at the end of its range: ``floor`` brings amax into
the largest binade with all mantissa bits, ``mse`` may go one further, and there are

========  ==========================================  ==========================================================
unit      0                                           HiF8's direct cast
pts       the tensor's best of -5 ... 4 by squared    HiF8's per-tensor scaling (the paper searches the same ten
          error; a tie takes the smallest             by each layer's output)
========  ==========================================  ==========================================================

Scales that are no powers of two (NVFP4, INT, HiF4) have ``absmax``: amax / M rounded to the scale's format. Besides:

=============  ==============================================================================================
four_over_six  NVFP4: amax becomes 6 or 4, whichever has the smaller squared error in its block; a tie takes 6. The
               tensor's scale leaves room for both: the largest block scale is 256 for 6, 384 for 4. Four Over Six:
               More Accurate NVFP4 Quantization with Adaptive Block Scaling, Cook et al., arXiv 2512.02010
full_range     INT: amax becomes (2^n - 1) / 2, 127.5 or 7.5, half a step beyond the largest code, to which it is rounded:
               steps are finer for everyone else. As openPangu's INT8 and INT4 on Atlas A2 (arXiv 2512.23367); there
               -amax takes the code -2^(n-1), which is as far from it as its neighbour and stays unused here
mse            HiF4: the best of seven neighbouring scales, three to each side of absmax's, by squared error
=============  ==============================================================================================

Formats with terms (``quantizers.sums``) get scale and terms of a block together:

=============  ==============================================================================================
minmax         int2, int3: the range from the smallest to the largest value, 0 included and on the grid
mse            the same range times the best of 1, 0.99 ... 0.21, by the errors' 2.4th power (GPTQ's clip search)
fit            the values that the codes ask for and the nearest codes, in turns, by least squares: PT2-LLM's iterative
               fitting (ternary), D2Quant's alternating least squares without columns (dual2, dual3)
=============  ==============================================================================================
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from microbat.formats.block import BlockFormat
from microbat.formats.element import E2M1, FLOAT32_BIAS, FLOAT32_MANTISSA_BITS, Element, exponent_of

MANTISSA_MASK = (1 << FLOAT32_MANTISSA_BITS) - 1


def floor(amax: Tensor, element: Element) -> Tensor:
    return exponent_of(amax) - element.home


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


def unit(amax: Tensor, element: Element) -> Tensor:
    return torch.zeros_like(amax, dtype=torch.int32)


POWER_OF_TWO_RULES: dict[str, Callable[[Tensor, Element], Tensor]] = {
    "floor": floor,
    "even": even,
    "rceil": rceil,
    "ceil": ceil,
    "unit": unit,
}
TENSOR_EXPONENTS = range(-5, 5)  # of scales under ``pts``: values are multiplied by 2^5 ... 2^-4
NEIGHBOURS = (-1, 1, -2, 2, -3, 3)  # scales that ``mse`` tries besides that of ``absmax``, the nearest first
WHOLE_TENSOR_RULES = ("pts",)


def rules_for(format: BlockFormat) -> tuple[str, ...]:
    """The names of the rules that ``format`` can be used with."""
    if format.terms:
        return ("mse", "minmax", "fit") if format.element.max > 1 else ("fit",)
    if format.scale_element.is_power_of_two:
        tapers = format.element.home < format.element.emax
        return ("floor", "mse", "unit", "pts") if tapers else ("floor", "even", "rceil", "ceil", "mse")
    if format.element == E2M1:
        return "absmax", "four_over_six"
    if format.element.is_fixed_point:
        return "absmax", "full_range"
    return ("absmax",) if format.scale_element.subnormals else ("absmax", "mse")


def largest(format: BlockFormat, rule: str) -> float:
    """What a block's largest magnitude becomes in units of a scale that is no power of two."""
    return format.element.max + (format.element.min_subnormal / 2 if rule == "full_range" else 0.0)


def sees_tensor(format: BlockFormat, rule: str) -> bool:
    """Whether a block's scale depends on the whole tensor, so that a tensor that grows has none."""
    return format.has_tensor_scale or rule in WHOLE_TENSOR_RULES


def default_rule(format: BlockFormat) -> str:
    """The rule that serves best: ``even`` for MXFP4 (within 1 % of the per-block optimum, and what engines compute for
    activations), ``rceil`` where precision is ample and saturation is the larger error."""
    preferred = "even" if format.element == E2M1 else "rceil"
    return preferred if preferred in rules_for(format) else rules_for(format)[0]
