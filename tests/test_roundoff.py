"""The constants of rounding: distinct names, and what one of them must be above or below."""

import numpy as np
import pytest

from keras_lipnext.norms import roundoff

pytestmark = pytest.mark.once


def test_every_constant_has_its_own_value():
    """Two names for one number would be two vocabularies again."""
    constants = {k: v for k, v in vars(roundoff).items() if isinstance(v, float)}
    assert len({*constants.values()}) == len(constants)


def test_units():
    assert np.finfo("float64").eps / 2 == roundoff.UNIT_ROUNDOFF
    assert roundoff.ROUNDING == 2 * roundoff.UNIT_ROUNDOFF
    assert np.finfo("float64").tiny == roundoff.SMALLEST_NORMAL
    for dtype in ("float64", "float32", "float16"):
        unit, smallest = roundoff.ARITHMETIC[dtype]
        assert (unit, smallest) == (np.finfo(dtype).eps / 2, np.finfo(dtype).tiny)


@pytest.mark.parametrize(
    "operations, factor", [(2, "UP_PRODUCT"), (3, "UP_PROOF"), (16, "UP_STEP")]
)
def test_factors_cover_so_many_roundings(operations, factor):
    """In exact arithmetic: (1 + u)^n is below the factor."""
    from fractions import Fraction

    u = Fraction(roundoff.UNIT_ROUNDOFF)
    assert (1 + u) ** operations < Fraction(getattr(roundoff, factor))


def test_gamma():
    assert roundoff.gamma(1) >= roundoff.UNIT_ROUNDOFF
    with pytest.raises(ValueError, match="sums of 100000000000000 terms"):
        roundoff.gamma(10**14)
