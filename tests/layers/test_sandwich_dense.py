import extended
import keras
import numpy as np
import pytest
import sdp_checks
from data import called, to_numpy
from test_layer_rules import built, lipschitz_bound_of, needs_long, whole

import keras_lipnext as lip
from keras_lipnext.layers import SandwichDense


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_equals_numpy(activation):
    """The kernel as it is drawn, Psi and b as they may become."""
    layer = SandwichDense(5, activation)
    layer.build((None, 7))
    rng = np.random.default_rng(1)
    layer.bias.assign(rng.normal(size=5))
    layer.log_psi.assign([1e30, -1e30, 0.5, -3, 2])  # clipped
    x = rng.normal(size=(3, 7)).astype("float32")
    expected = extended.LAYERS["SandwichDense"](layer, x.astype(extended.LONG))
    expected = expected.astype("float64")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(called(layer, x), expected, rtol=1e-5, atol=1e-5 * scale)


def test_the_kernel_is_the_papers_condition():
    layer = SandwichDense(5)
    layer.build((None, 7))
    kernel = to_numpy(layer.kernel)
    a, b = kernel[:5].T, kernel[5:].T
    np.testing.assert_allclose(a @ a.T + b @ b.T, np.eye(5), atol=1e-6)


def steep(norm, seed=0):
    """One unit, one input, of slope 2 A B = s^2 where the ReLU is linear, s the kernel's norm."""
    model = built(lambda: SandwichDense(1, "relu", use_bias=False), (1,), seed)
    model.layers[-1].kernel.assign(np.full((2, 1), norm / np.sqrt(2)))
    return model


def slope(model):
    x = np.array([[1.0], [2.0]], "float32")
    low, high = called(model, x)
    return abs(float(high[0] - low[0]))


def test_the_constant_is_the_square_of_the_norm():
    """A kernel off the manifold: what counts s once is below the slope."""
    for norm in (1.0, 1.1, 1.3):
        model = steep(norm)
        constant = lipschitz_bound_of(whole(model))
        assert constant == pytest.approx(norm**2, rel=1e-6)
        assert slope(model) == pytest.approx(norm**2, rel=1e-5)


@needs_long
def test_psi_is_divided_by_and_multiplied_with():
    """No Psi makes the layer steeper; without its inverse in front it would be as steep as that."""
    model = built(lambda: SandwichDense(4, "relu"), (6,))
    layer = model.layers[-1]
    constant = lipschitz_bound_of(whole(model))
    x = np.random.default_rng(0).normal(size=(64, 6))
    for size in (-15.0, 0.0, 15.0):
        layer.log_psi.assign(np.full(4, size) + np.arange(4))
        values = extended.LAYERS["SandwichDense"](layer, x.astype(extended.LONG))
        steps = np.linalg.norm((values[1:] - values[:-1]).astype("float64"), axis=1)
        stretches = steps / np.linalg.norm(x[1:] - x[:-1], axis=1)
        assert stretches.max() <= constant
        assert lipschitz_bound_of(whole(model)) == constant


def test_float32_programs_are_certified():
    inputs = keras.Input((8,))
    x = SandwichDense(16)(inputs)
    model = lip.CertifiableModel(inputs, lip.layers.NormalizedDense(3)(SandwichDense(16)(x)))
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    double = lip.certify(model, x, verbose=0)
    single = lip.certify(model, x, verbose=0, arithmetic="float32")
    assert double.body_constant == pytest.approx(1, rel=1e-5)
    certified = double.radii > 0.01
    assert certified.sum() > 8
    ratio = single.radii[certified] / double.radii[certified]
    assert (ratio <= 1).all() and np.median(ratio) > 0.9


def test_an_empty_kernel_is_refused():
    model = built(lambda: SandwichDense(4), (6,))
    model.layers[-1].kernel.assign(np.zeros((10, 4)))
    with pytest.raises(ValueError, match="all-zero kernel"):
        lip.lipschitz_bound(model)


def test_activations():
    sdp_checks.check_activations(SandwichDense, {"units": 3}, "0, 1")


def test_half_precision():
    for dtype in ("float16", "bfloat16", "mixed_bfloat16"):
        layer = SandwichDense(4, dtype=dtype)
        outputs = layer(np.ones((2, 3), "float32"))
        assert keras.backend.standardize_dtype(outputs.dtype) == layer.compute_dtype
        assert np.isfinite(to_numpy(keras.ops.cast(outputs, "float32"))).all()
