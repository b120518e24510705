"""The vocabulary of rounding: what every proof in this package calls how large an error.

Two models of arithmetic are in use. A *proof* in NumPy (norms, matrix inequalities) counts each
operation once, with the unit roundoff u. The *evaluation* of a model in float64 is left to a
backend and its compiler, which may turn one operation into two: it counts 2 u for each.
"""

# u, of float64: an operation is off by at most u, relatively.
UNIT_ROUNDOFF = 2.0**-53
# 2 u: what one operation of an evaluated model may be off by. The factor 2 leaves room for what a
# compiler may do to an expression, as multiplying by a reciprocal.
ROUNDING = 2.0**-52

# The smallest normal number of float64. In a proof, what underflows is wrong by less.
SMALLEST_NORMAL = 2.0**-1022
# In an evaluated model: above every number that underflows, times what one operation may multiply
# it by. Backends may flush subnormal numbers to zero.
UNDERFLOW = 2.0**-960
# Distances and constants that are not 0 are taken to be no smaller: a product that underflows is
# rounded in units that are no longer relative.
SMALLEST_DISTANCE = 2.0**-1000

# Factors that cover the roundings of the bookkeeping itself, always of positive numbers:
UP_PRODUCT = 1 + 2.0**-51  # one product of two constants, and of what is in them
UP_PROOF = 1 + 8 * UNIT_ROUNDOFF  # a square root or quotient at the end of a proof
UP_STEP = 1 + 16 * ROUNDING  # the handful of operations that carry errors through a step
UP_ERROR = 1 + 2.0**-40  # sums over a whole matrix that bound an error

# Per type: the unit roundoff, and the size below which numbers lose digits or vanish.
ARITHMETIC = {
    "float64": (UNIT_ROUNDOFF, SMALLEST_NORMAL),
    "float32": (2.0**-24, 2.0**-126),
    "bfloat16": (2.0**-8, 2.0**-126),
    "float16": (2.0**-11, 2.0**-14),
}
# Float32 products on accelerators may be computed in TF32.
TF32 = (2.0**-11, 2.0**-126)


def gamma(n):
    """Relative error bound of a sum of n products in any order: n u / (1 - n u)."""
    if n * UNIT_ROUNDOFF >= 0.01:
        raise ValueError(f"Rounding errors of sums of {n} terms cannot be bounded usefully.")
    return n * UNIT_ROUNDOFF / (1 - n * UNIT_ROUNDOFF)
