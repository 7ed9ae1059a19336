"""Number formats inside a kernel: what ``formats.element``, ``formats.scales`` and ``quantizers.kernel`` do, on tiles.

A format travels as a compile-time constant, the :class:`BlockFormat` itself: its numbers are folded into the code and
its kinds select it. Same bits as the torch functions of the same names; only sums run in another order.
Launch with ``**EXACT``: a fused multiply-add would round once where torch rounds twice.
"""

# Shapes: R rows of a tile, each one block; B lanes of a block.

import triton
import triton.language as tl

EXACT = {"enable_fp_fusion": False}


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """2**exponent for int32 exponents in [-127, 127]; -127 is the subnormal that E8M0 code 0 means."""
    return float_of(tl.where(exponent <= -127, 1 << 22, (exponent + 127) << 23))


@triton.jit
def reciprocal_of_power(scale):
    """1 / scale, exact, for powers of two in [2**-127, 2**127]; arbitrary for NaN."""
    return power_of_two(127 - (bits_of(scale) >> 23))


@triton.jit
def with_sign(magnitude, x):
    return float_of((bits_of(magnitude) & 0x7FFFFFFF) | (bits_of(x) & -0x80000000))


@triton.jit
def round_to(x, E: tl.constexpr):
    """``E.round(x)``: to nearest, ties to even, saturating; NaN stays NaN."""
    if E.mantissa_bits == 23:
        return x
    elif E.exponent_bits == 8:
        bits = bits_of(x)  # a cast would do, but Triton's interpreter truncates
        nearest = float_of((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000)
        return tl.where(x != x, x, nearest)
    else:
        magnitude = tl.minimum(tl.abs(x), E.max, propagate_nan=tl.PropagateNan.ALL)
        # A fixed-point number has one step throughout, and E.emin lies above all of its exponents.
        binade = tl.maximum(bits_of(magnitude) & 0x7F800000, (E.emin + 127) << 23)
        shift = float_of(binade + ((23 - E.mantissa_bits) << 23))
        return with_sign((magnitude + shift) - shift, x)


@triton.jit
def encode(x, E: tl.constexpr):
    """``E.encode(x)``: int32 codes of values on the grid; NaN has a code only where the format has one."""
    if E.is_fixed_point:
        return (x * 2.0**E.bias).to(tl.int32) & ((1 << E.bits) - 1)
    elif E.is_power_of_two:
        return (bits_of(x) >> 23) & 0xFF  # the exponent field itself: 0 is 2**-127, 255 is NaN
    else:
        bits = bits_of(x)
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude >> (23 - E.mantissa_bits)) - ((126 + E.emin) << E.mantissa_bits)
        small = tl.minimum(tl.abs(x), 2.0**E.emin)
        subnormal = (small * 2.0 ** (E.mantissa_bits - E.emin)).to(tl.int32)
        code = tl.where(small < 2.0**E.emin, subnormal, normal)
        if E.specials != "none":
            code = tl.where(magnitude > 0x7F800000, E._nan_code, code)
        if E.signed:
            code = code | (((bits >> 31) & 1) << (E.bits - 1))
        return code


@triton.jit
def decode(code, E: tl.constexpr):
    """``E.decode(code)``: float32 values of int32 codes below 2**E.bits."""
    if E.is_fixed_point:
        return ((code << (32 - E.bits)) >> (32 - E.bits)).to(tl.float32) * 2.0**-E.bias
    elif E.is_power_of_two:
        return tl.where(code == 255, float("nan"), power_of_two(code - 127))
    else:
        magnitude = code & ((1 << (E.bits - 1)) - 1)
        # The fields where float32 has them, subnormals included, then the difference of the biases: exact, unless a
        # machine flushes float32 subnormals to zero. Triton's targets do not; a test reads that in their code.
        value = float_of(magnitude << (23 - E.mantissa_bits)) * 2.0 ** (127 - E.bias)
        if E.specials == "nan":
            value = tl.where(magnitude == E._nan_code, float("nan"), value)
        elif E.specials == "ieee":
            infinity: tl.constexpr = ((1 << E.exponent_bits) - 1) << E.mantissa_bits
            value = tl.where(magnitude == infinity, float("inf"), value)
            value = tl.where(magnitude > infinity, float("nan"), value)
        return float_of(bits_of(value) | ((code >> (E.bits - 1)) << 31))


@triton.jit
def largest_magnitude(x):
    """max |x| over lanes, [R, B] to [R]; by the bits, in which NaN is the largest."""
    return float_of(tl.max(bits_of(x) & 0x7FFFFFFF, 1))


@triton.jit
def bounds(x, low, high):
    """Clip bounds [R] of blocks [R, B] from ratios [R]: shares of each block's extremes."""
    return low * tl.minimum(tl.min(x, 1), 0.0), high * tl.maximum(tl.max(x, 1), 0.0)


@triton.jit
def clip(x, low, high):
    """Blocks [R, B] within bounds [R], and the magnitude [R] that their scale comes from; NaN and Inf stay visible."""
    largest = largest_magnitude(x)
    amax = tl.where(largest < float("inf"), tl.maximum(high, -low), largest)
    return tl.minimum(tl.maximum(x, low[:, None]), high[:, None]), amax


@triton.jit
def scale_exponent(amax, E: tl.constexpr, RULE: tl.constexpr):
    """The exponent that a power-of-two rule of ``formats.scales`` gives, in [-127, 127]."""
    bits = bits_of(amax)
    if RULE == "even":
        significant: tl.constexpr = E.mantissa_bits - 1 if E.is_fixed_point else E.mantissa_bits
        bits += 1 << (22 - significant)
    exponent = (bits >> 23) - 127 - E.emax
    mantissa = float_of((bits & 0x7FFFFF) | 0x3F800000)  # in [1, 2)
    if RULE == "rceil":
        exponent += (mantissa > E.max * 2.0**-E.emax).to(tl.int32)
    elif RULE == "ceil":
        exponent += (mantissa > 1.0).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, -127), 127)


@triton.jit
def squared_error(x, scale, E: tl.constexpr):
    scaled = x * reciprocal_of_power(scale)[:, None]
    error = round_to(scaled, E) - scaled
    overflows = largest_magnitude(scaled) == float("inf")
    return tl.where(overflows, float("inf"), tl.sum(error * error, 1)) * (scale * scale)


@triton.jit
def block_scale(x, amax, outer, F: tl.constexpr, RULE: tl.constexpr):
    """``quantizers.kernel.block_scale``: scales [R] of blocks [R, B]; ``outer``, a number, only where F has that level."""
    E: tl.constexpr = F.element
    S: tl.constexpr = F.scale_element
    if S.is_power_of_two:
        if RULE == "mse":
            exponent = scale_exponent(amax, E, "floor")
            wider = tl.minimum(exponent + 1, 127)
            better = squared_error(x, power_of_two(wider), E) < squared_error(x, power_of_two(exponent), E)
            exponent = tl.where(better, wider, exponent)
        else:
            exponent = scale_exponent(amax, E, RULE)
        return tl.where(amax < float("inf"), power_of_two(exponent), float("nan"))
    elif F.has_tensor_scale:
        scale = round_to(tl.div_rn(tl.div_rn(amax, outer), E.max), S)
        return tl.maximum(scale, 2.0**-9, propagate_nan=tl.PropagateNan.ALL)  # quantizers.kernel.MIN_FLOAT_SCALE
    else:
        largest: tl.constexpr = E.max + E.min_subnormal / 2 if RULE == "full_range" else E.max
        return round_to(tl.div_rn(amax, largest), S)


@triton.jit
def round_blocks(x, scale, F: tl.constexpr):
    """``quantizers.kernel.round_blocks``: element values [R, B] of blocks under scales [R], all levels multiplied."""
    E: tl.constexpr = F.element
    if F.scale_element.is_power_of_two:
        return round_to(x * reciprocal_of_power(scale)[:, None], E)
    else:
        divisor = tl.where(scale == 0, 1.0, scale)[:, None]
        return round_to(tl.where(scale[:, None] == 0, 0.0, tl.div_rn(x, divisor)), E)
