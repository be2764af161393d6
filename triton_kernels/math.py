"""Elementary functions for the rows' formulas, to a few units in the last place of float32 and float64.

Mirrors csrc/math.h. `tl.exp2` and `tl.log` of float32 are a processor's approximations, and a product with log2(e) that
is rounded before makes an exponential err relatively by its argument times 2^-24. That is enough for the sums over a
row, whose largest term is exp(0) (`exp_quick`); it is not for a probability of exp(-30) that becomes a gradient.
Everything here is plain arithmetic, so that the interpreter computes what a device does.
"""

import triton
import triton.language as tl

__all__ = ["arccos", "exp_nonpositive", "exp_quick", "expm1_nonpositive", "log1p_unit", "tanh", "tanh_slope"]

LOG2_E = tl.constexpr(1.4426950408889634)
TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded to an integer
LN_2_HIGH = tl.constexpr(0.693359375)  # ten bits: its product with an exponent of two is exact
LN_2_LOW = tl.constexpr(-2.12194440054690583e-4)
PI = tl.constexpr(3.14159265358979323846)


@triton.jit
def exp_quick(x):
    """Return exp(x) in two instructions; tl.exp takes five, three of them for results below 2^-126, here 0."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        result = tl.exp2(x * LOG2_E)
    return result


@triton.jit
def exp_nonpositive(x):
    """Return exp(x) for x <= 0; in float32 0 below the logarithm of the least normal number, about -87.3."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        # A float beyond 2^23 holds integers alone: the last bits of the sum are the exponent of two.
        shifted = x * LOG2_E + TO_INTEGER
        twos = shifted - TO_INTEGER
        remainder = (x - twos * LN_2_HIGH) - twos * LN_2_LOW
        series = 0.00837521020 + 0.00139412131 * remainder  # minimax to 2.0e-9, where exp2 would take as long
        series = 0.166664145 + (0.0416663516 + series * remainder) * remainder
        series = 1.0 + (1.00000004 + (0.500000005 + series * remainder) * remainder) * remainder
        power = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
        result = tl.where(x < -87.3, 0.0, series * power.to(tl.float32, bitcast=True))
    return result


@triton.jit
def expm1_nonpositive(x):
    """Return exp(x) - 1 for x <= 0, to full relative accuracy near 0."""
    terms: tl.constexpr = 15 if x.dtype == tl.float64 else 9
    near = tl.where(x < -0.5, -0.5, x)
    series = tl.zeros_like(x) + 1.0
    for i in tl.static_range(terms - 1):  # x (1 + x/2 (1 + x/3 (...)))
        series = 1.0 + series * near / (terms - i)
    return tl.where(x < -0.5, exp_nonpositive(x) - 1.0, near * series)


@triton.jit
def log1p_unit(x):
    """Return log(1 + x) for x in [0, 1], to full relative accuracy near 0."""
    if x.dtype == tl.float64:
        ratio = x / (2.0 + x)  # log(1 + x) = 2 artanh(ratio), a series in ratio^2 <= 1/9
        square = ratio * ratio
        series = tl.zeros_like(x) + 1.0 / 33
        for i in tl.static_range(16):
            series = series * square + 1.0 / (31 - 2 * i)
        result = 2.0 * ratio * series
    else:
        series = 0.0195425273 - 0.00317605702 * x  # minimax to 5.2e-9, without a division
        series = 0.105436238 + (-0.0563736128 + series * x) * x
        series = 0.196632743 + (-0.152696671 + series * x) * x
        series = 0.333297105 + (-0.249516163 + series * x) * x
        series = 0.999999995 + (-0.499998926 + series * x) * x
        result = x * series
    return result


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent; in float64 its absolute error is a few 2^-53."""
    size = tl.abs(x)
    small = tl.exp(-2.0 * size)
    large = (1.0 - small) / (1.0 + small)
    if x.dtype != tl.float64:  # 1 - small cancels near 0
        square = size * size
        series = 0.02075134911 - 0.00584964391 * square
        series = 0.1333167963 + (-0.05376798351 + series * square) * square
        series = 1.0 + (-0.3333328283 + series * square) * square  # minimax on [0, 0.6]: 2.5e-9
        large = tl.where(size < 0.6, size * series, large)
    return tl.where(x < 0, -large, large)


@triton.jit
def tanh_slope(x):
    """Return 1 - tanh(x)^2, to full relative accuracy."""
    small = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def _arcsin_small(x, square):
    """Return arcsin(x) for x in [0, 1/2]: a polynomial in the square, minimax to 1.7e-17."""
    series = -0.0161873922715991332 + 0.0318796214008128394 * square
    series = 0.00652930200473656928 + (0.019513468251252168 + series * square) * square
    series = 0.0138848428264020808 + (0.0121701385923917263 + series * square) * square
    series = 0.0223717497331640541 + (0.0173597796413499801 + series * square) * square
    series = 0.0446428568059989384 + (0.0303819596976851382 + series * square) * square
    series = 0.166666666666649412 + (0.0750000000038520167 + series * square) * square
    return x * (1.0 + series * square)


@triton.jit
def arccos(x):
    """Return the angle in [0, pi] whose cosine is x."""
    size = tl.abs(x)
    outer = size > 0.5
    square = tl.where(outer, (1.0 - size) * 0.5, size * size)
    arcsin = _arcsin_small(tl.sqrt(square), square)
    positive = tl.where(outer, 2.0 * arcsin, 0.5 * PI - arcsin)
    return tl.where(x < 0, PI - positive, positive)
