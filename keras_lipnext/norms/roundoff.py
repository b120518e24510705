"""The vocabulary of rounding: what every proof in this package calls how large an error.

Two models of arithmetic are in use. A *proof* in NumPy (norms, matrix inequalities) counts each
operation once, with the unit roundoff u. The *evaluation* of a model in float64 is left to a
backend and its compiler, which may turn one operation into two: it counts 2 u for each. So does a
*program*, the deployed model in float64 or float32, with what the order of its sums may do to it.
"""

import dataclasses

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
    "float8_e4m3fn": (2.0**-4, 2.0**-6),
    "float8_e5m2": (2.0**-3, 2.0**-14),
}
# Float32 products on accelerators may be computed in TF32.
TF32 = (2.0**-11, 2.0**-126)


class SumTooLong(ValueError):
    """More terms than rounding can be bounded of."""


def gamma(n, unit=UNIT_ROUNDOFF):
    """Relative error bound of a sum of n products in any order: n u / (1 - n u)."""
    if n * unit >= 0.01:
        raise SumTooLong(f"rounding errors of sums of {n:.0f} terms cannot be bounded usefully")
    return n * unit / (1 - n * unit)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What one operation of an evaluated model may be off by.

    Attributes:
        name: Of the floating point type.
        unit: Its unit roundoff u.
        underflow: `UNDERFLOW`, of the type.
        smallest: Its smallest normal number: what underflows is wrong by less.
        limit: Norms up to which nothing overflows, squares and sums of magnitudes included.
        program: Whether of a program of which nothing is known but its formula: sums in any order,
            with what is added to them among their terms, and constants rounded to its type. The
            evaluation that `certify` makes itself keeps its constants in float64.
        factors: How many factors in a row a compiler may multiply into the weights of a sum, from
            either side.
    """

    name: str
    unit: float
    underflow: float
    smallest: float
    limit: float
    program: bool = True
    factors: int = 0

    @property
    def rounding(self):
        """`ROUNDING`, of the type."""
        return 2 * self.unit

    def gamma(self, n):
        """`gamma`, of the type."""
        return gamma(n, self.unit)

    def products(self, terms):
        """(a, b): a sum s = t_1 + ... + t_n of products is off by at most a sum |t_k| + b |s|.

        Whatever the order, in any tree of additions, with or without fused multiply-add. Every
        intermediate result is the sum of a subset of the terms, and so within -N and P, the sums of
        the negative and of the positive ones: of magnitude at most (sum |t_k| + |s|) / 2, but for
        the rounding before it, gamma(n) sum |t_k|. Each addition is off by u of that, each product
        by u of itself. Three terms may be added to the products (a bias, a residual branch, both),
        and weights be rounded to the type: n = terms + 4. Each factor that was multiplied into a
        weight rounds its product once more. [Higham, chapters 3.1 and 4.2; that the partial sums of
        an unknown order lie within -N and P is what halves its bound.]
        """
        n = terms + 4 + 4 * self.factors
        half = n * self.unit / 2
        return (self.unit + half + 2 * half * self.gamma(n)) * UP_STEP, half * UP_STEP


# The evaluation that `certify` makes, and the programs that it may speak of.
EVALUATION = Arithmetic("float64", UNIT_ROUNDOFF, UNDERFLOW, SMALLEST_NORMAL, 2.0**500, False)
PROGRAMS = {
    "float64": dataclasses.replace(EVALUATION, program=True),
    "float32": Arithmetic("float32", 2.0**-24, 2.0**-116, 2.0**-126, 2.0**56),
}
