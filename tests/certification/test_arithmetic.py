"""Certificates of programs: float64 and float32, sums in any order, at every point of a ball."""

import fractions
import json
import os

import keras
import numpy as np
import pytest
import red_team
import test_soundness
from data import small_lipnext, to_numpy
from red_team import ORDERS, U, f32

import keras_lipnext as lip
from keras_lipnext.certification import evaluation
from keras_lipnext.lipschitz.model import measured, read
from keras_lipnext.lipschitz.program import ARITHMETICS
from keras_lipnext.norms.matrices import nonnegative_norm_bound
from keras_lipnext.norms.roundoff import EVALUATION, PROGRAMS
from keras_lipnext.twin import Float64Twin

kl = keras.layers

AFFINE = 2  # number of a drawn architecture of one layer, many inputs and two classes


def exact(w, x):
    """(sum, sum of magnitudes) of the products, as fractions."""
    products = [fractions.Fraction(float(a)) * fractions.Fraction(float(b)) for a, b in zip(w, x)]
    return sum(products), sum(map(abs, products))


@pytest.mark.once
@pytest.mark.parametrize("order", ORDERS)
def test_sums_in_any_order_are_within_the_bound(order):
    """Random ones, ones that cancel, and ones that lose their terms one by one."""
    rng = np.random.default_rng(0)
    cases = []
    for n in (2, 7, 64, 300):
        w, x = rng.normal(size=(2, n)).astype(f32)
        cases += [(w, x), (w, f32(1) + 0 * x), (np.abs(w), np.abs(x))]
        big = w * f32(2.0**20)
        cases.append((np.concatenate([big, -big, w]), np.ones(3 * n, f32)))
        small = np.full(n, f32(U * 0.999))
        cases.append((np.concatenate([[f32(1)], small]), np.ones(n + 1, f32)))
    largest = 0.0
    for w, x in cases:
        total, magnitudes = exact(w, x)
        # Of these terms one may be a bias: they are one product fewer than there are terms.
        a, b = PROGRAMS["float32"].products(len(w) - 1)
        computed = fractions.Fraction(float(ORDERS[order](w, x)))
        allowed = fractions.Fraction(a) * magnitudes + fractions.Fraction(b) * abs(total)
        assert abs(computed - total) <= allowed
        largest = max(largest, float(abs(computed - total) / allowed))
    if order in ("forward", "large first"):
        assert largest > 0.9  # no smaller bound holds


@pytest.mark.once
def test_norm_of_magnitudes():
    rng = np.random.default_rng(0)
    for shape in ((5, 5), (40, 7), (3, 60), (1, 1)):
        matrix = np.abs(rng.normal(size=shape)) * rng.choice([0, 1, 1e-200], size=shape)
        truth = np.linalg.norm(matrix, 2)
        assert truth <= nonnegative_norm_bound(matrix) <= truth * 1.01 + 1e-150
    assert nonnegative_norm_bound(np.zeros((3, 2))) == 0
    apart = np.diag([1.0, 1e-3])
    assert 1 <= nonnegative_norm_bound(apart) < 1.001


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"body": True}])
def test_terms_that_are_lost_one_by_one(settings):
    """The worked example of docs/explanation/soundness.md."""
    model, x = red_team.absorbing(**settings)
    naive = lip.certify(model, x, verbose=0, arithmetic="real")
    assert naive.radii[0] > 1e-5 and naive.predictions[0] == 1
    assert "large first" in red_team.flips(model, x, naive)
    for arithmetic in ("float64", "float32"):
        certificate = lip.certify(model, x, verbose=0, arithmetic=arithmetic)
        assert certificate.predictions[0] == 1
        assert (certificate.radii[0] > 0) == (arithmetic == "float64")


def test_constants_that_cancel():
    """Correct in one order, wrong in another: nothing is certified of the program."""
    model, x = red_team.cancelling()
    naive = lip.certify(model, x, verbose=0, arithmetic="real")
    found = red_team.flips(model, x, naive)
    assert naive.radii[0] > 0.05
    assert (
        "positive first" in found and "pairwise" not in found and "fused multiply-add" not in found
    )
    assert lip.certify(model, x, verbose=0, arithmetic="float32").radii[0] == 0


def dense_network(seed, width=24, offset=0.0):
    """A chain of Dense layers and BetaAbs, with biases of a size that cancels behind them."""
    rng = np.random.default_rng(seed)
    inputs = keras.Input((width,))
    x = kl.Dense(width, activation="relu")(inputs)
    x = lip.layers.BetaAbs(0.5)(kl.Dense(width)(x))
    model = keras.Model(inputs, kl.Dense(3)(x))
    for layer in model.layers:
        if layer.weights:
            kernel = rng.normal(size=layer.kernel.shape) / np.sqrt(width)
            layer.set_weights([kernel, offset * rng.normal(size=layer.bias.shape)])
    model.layers[-1].bias.assign(np.zeros(3))
    logits = to_numpy(model(np.zeros((1, width), f32)))[0]
    model.layers[-1].bias.assign(-logits)
    return model


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_no_program_flips_within_the_radius(offset):
    """Thirteen orders and the backend's own, near the border, and at neighbouring floats."""
    certified = 0
    for seed in range(3):
        model = dense_network(seed, offset=offset)
        x = np.random.default_rng(seed).normal(size=(12, 24)).astype(f32)
        certificate = red_team.survives(model, x)
        certified += (certificate.radii > 0).sum()
    assert certified > 25


def test_float64_programs_at_the_border():
    """The radius of real arithmetic allows for rounding at x alone: for them it is too large."""
    model, x = red_team.growing()
    orders = ("forward", "reversed", "pairwise", "positive first", "large first")
    flipped = {}
    for arithmetic in ("real", "float64"):
        certificate = lip.certify(model, x, verbose=0, arithmetic=arithmetic)
        assert (certificate.radii > 0.1).all()
        moved = red_team.towards_boundary(model, x, certificate, 1 - 1e-14)
        answers = [red_team.evaluated(model, moved, o, np.float64) for o in orders]
        flipped[arithmetic] = sum((z.argmax(axis=1) != 0).sum() for z in answers)
        assert (certificate.predictions == 0).all()
    assert flipped["real"] > 0 and flipped["float64"] == 0


@pytest.mark.slow
def test_random_networks_in_every_order():
    """`benchmarks/soundness.py --orders` draws thousands."""
    certified = 0
    for number in range({"torch": 4}.get(keras.backend.backend(), 1)):
        architecture = red_team.Architecture(number)
        for seed in range(4):
            certified += (architecture.survives(seed).radii > 0).sum()
    assert certified > 20


@pytest.mark.parametrize(
    "fault",
    [
        test_soundness.unit_of_float64,
        test_soundness.pairwise_sums,
        test_soundness.head_of_exact_sums,
    ],
)
def test_the_search_finds_radii_that_are_too_large(fault):
    """Of the unit roundoff of float64, of one order of summation, of a head that does not round."""
    architecture = red_team.Architecture(AFFINE)
    with test_soundness.unguarded(fault), pytest.raises(AssertionError, match=r": \["):
        for seed in range(20):
            architecture.survives(seed)


def test_what_is_compiled_once_certifies_as_what_is_not():
    architecture = red_team.Architecture(AFFINE)
    for seed in (0, 1):
        found = architecture.survives(seed)
        anew = lip.certify(architecture.model, architecture.draw(seed), arithmetic="float32")
        np.testing.assert_array_equal(found.radii, anew.radii)
        np.testing.assert_array_equal(found.predictions, anew.predictions)


def test_radii_of_the_naive_certificate_are_crossed():
    """The same search finds flips within the radii of real arithmetic."""
    found = 0
    for seed in range(4):
        model = affine_network(seed)
        x = np.random.default_rng(seed).normal(size=(20, 24)).astype(f32)
        naive = lip.certify(model, x, verbose=0, arithmetic="real")
        moved = red_team.towards_boundary(model, x, naive)
        found += len(red_team.flips(model, moved, naive))
        red_team.survives(model, x, orders=("forward", "positive first", "large first"))
    assert found > 0


def affine_network(seed, width=24):
    """One linear layer: the border is where the certificate of real arithmetic ends."""
    rng = np.random.default_rng(seed)
    inputs = keras.Input((width,))
    model = keras.Model(inputs, kl.Dense(2)(inputs))
    common = 100 * rng.normal(size=width)
    kernel = np.stack([common, common + rng.normal(size=width)], axis=1)
    model.layers[-1].set_weights([kernel, np.zeros(2)])
    return model


def test_the_order_of_radii_and_what_float64_costs():
    """Real arithmetic promises least, float32 most; float64 costs less than a millionth."""
    model = small_lipnext(depth=1)
    x = np.random.default_rng(0).random((33, 8, 8, 1)).astype(f32)
    real, double, single = (
        lip.certify(model, x, verbose=0, arithmetic=a).radii for a in ("real", "float64", "float32")
    )
    large = real > np.median(real)
    assert (double <= real).all() and (single <= double).all()
    assert (double > real * (1 - 1e-6))[large].all()
    assert (single > real * (1 - 5e-3))[large].all() and (single < double).all()


def test_each_sample_is_certified_by_its_own_norms():
    """Also where a fixed batch size has the batch evaluated a second time, in another order."""
    inputs = [keras.Input((6,)), keras.Input(batch_shape=(4, 6))]
    dense = [kl.Dense(6, activation="relu"), kl.Dense(6), kl.Dense(2)]
    free, fixed = (keras.Sequential([i, *dense]) for i in inputs)
    x = np.random.default_rng(0).normal(size=(4, 6)) * np.array([[1.0], [100.0], [1e-3], [10.0]])
    radii = [lip.certify(m, x, verbose=0, arithmetic="float32").radii for m in (free, fixed)]
    np.testing.assert_allclose(*radii, rtol=1e-12)
    assert (radii[0] > 0).all()


def test_each_arithmetic_says_what_it_promises(tmp_path):
    model, x = dense_network(0), np.ones((1, 24), f32)
    for arithmetic in ARITHMETICS:
        certificate = lip.certify(model, x, verbose=0, arithmetic=arithmetic)
        assert certificate.arithmetic == arithmetic
        certificate.to_json(tmp_path / "c.json")
        assert json.loads((tmp_path / "c.json").read_text())["arithmetic"] == arithmetic
        promised, *_, not_promised = lip.certification.certify.__globals__["text"].promise(
            certificate
        )
        program = f"every program that evaluates it in {arithmetic}"
        assert (program in promised) == (program in str(certificate)) == (arithmetic != "real")
        assert ("float32 or below" in not_promised) == (arithmetic != "float32")
    assert lip.certify(model, x, verbose=0).arithmetic == "float64"
    with pytest.raises(
        ValueError, match=r"must be one of real, float64, float32\. Received: arith"
    ):
        lip.certify(model, x, verbose=0, arithmetic="bfloat16")


@pytest.mark.parametrize("arithmetic", ["float64", "float32"])
def test_no_radius_where_the_model_itself_answers_otherwise(arithmetic, monkeypatch):
    """Of batches that nothing else compares, and of infinite answers, which nothing else heeds."""
    real, calls = evaluation.own_answer, []

    def spoiled(model, inputs):
        answers = real(model, inputs).copy()
        if np.array_equal(inputs, x[:4]):
            answers[1] = np.nan
        elif np.array_equal(inputs, x[4:8]):
            answers[0], answers[3] = -answers[0], np.inf * answers[3]
        calls.append(len(inputs))
        return answers

    model, x = dense_network(0), np.random.default_rng(0).random((12, 24)).astype(f32)
    settings = {"arithmetic": arithmetic, "batch_size": 4, "verbose": 0}
    before = lip.certify(model, x, **settings)
    assert (before.radii > 0).all() and before.low_precision_differences is None
    monkeypatch.setattr(evaluation, "own_answer", spoiled)
    if arithmetic == "float64":  # of which `predict` is no program
        after = lip.certify(model, x, **settings)
        np.testing.assert_array_equal(after.radii, before.radii)
        return
    with pytest.warns(UserWarning, match="own answers to 3 samples are not finite, or of another"):
        after = lip.certify(model, x, **settings)
    spoiled_samples = np.isin(np.arange(12), [1, 4, 7])
    np.testing.assert_array_equal(after.radii, np.where(spoiled_samples, 0.0, before.radii))
    np.testing.assert_array_equal(after.predictions, before.predictions)


def test_a_certificate_of_before_promises_what_it_did():
    fields = {"predictions": np.zeros(1, int), "radii": np.ones(1), "labels": None}
    old = lip.certification.Certificate(**fields, epsilons=(), constant=1.0, body_constant=1.0)
    assert old.arithmetic == "real"


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "mixed_float16"])
def test_low_precision_is_no_float32_program(policy):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, kl.Dense(3, dtype=policy)(inputs))
    x = np.ones((2, 4), f32)
    with pytest.raises(ValueError, match=r"no float32 program: .* computes in b?float16"):
        lip.certify(model, x, verbose=0, arithmetic="float32")
    certificate = lip.certify(model, x, verbose=0)
    own = to_numpy(keras.ops.cast(model.predict_on_batch(x), "float32"))
    apart = abs(np.ptp(own, axis=1) - np.ptp(Float64Twin(model)(x), axis=1))
    assert (certificate.low_precision_allowances > 0.1 * apart).all()
    assert "is not certified" in str(certificate) and "may do to the logits" in str(certificate)
    assert certificate.to_dict()["low_precision_allowance"] > 1e-4


def test_layers_whose_float32_is_not_known_are_named():
    inputs = keras.Input((4, 4, 1))
    resized = kl.Resizing(6, 6, interpolation="bilinear", name="wider")(inputs)
    model = keras.Model(inputs, kl.Dense(2)(kl.Flatten()(resized)))
    x = np.ones((1, 4, 4, 1), f32)
    with pytest.raises(ValueError, match=r"wider.* cannot be certified as a float32 program"):
        lip.certify(model, x, verbose=0, arithmetic="float32")
    assert lip.certify(model, x, verbose=0).radii.shape == (1,)


class Declared(kl.Layer):
    lipschitz_constant = 1.0

    def call(self, inputs):
        return inputs


def test_a_declared_layer_is_no_float32_program():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, kl.Dense(2)(Declared()(inputs)))
    with pytest.raises(ValueError, match="its rule is declared"):
        lip.certify(model, np.ones((1, 4)), verbose=0, arithmetic="float32")


def torch_matmul(on):
    import torch

    torch.set_float32_matmul_precision("medium" if on else "highest")


def torch_onednn(on):
    import torch

    torch.backends.mkldnn.fp32_precision = "bf16" if on else "none"


def torch_autocast(on):
    import torch

    torch.set_autocast_enabled("cpu", on)


def jax_matmul(on):
    import jax

    jax.config.update("jax_default_matmul_precision", "bfloat16" if on else None)


def tensorflow_rewriting(on):
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": on})


def variable(name, value):
    def switch(on):
        os.environ.update({name: value}) if on else os.environ.pop(name)

    return switch


# What lets float32 be less, and a word of the message.
SETTINGS = [
    ("torch", torch_matmul, r"set_float32_matmul_precision\(\"highest\"\)"),
    ("torch", torch_onednn, r"fp32_precision is 'bf16'"),
    ("torch", torch_autocast, r"torch\.autocast is on"),
    ("jax", jax_matmul, r"jax_default_matmul_precision is 'bfloat16'"),
    ("jax", variable("XLA_FLAGS", "--xla_cpu_enable_fast_math=true"), r"XLA_FLAGS"),
    ("tensorflow", tensorflow_rewriting, r"auto_mixed_precision_onednn_bfloat16 is on"),
    ("tensorflow", variable("TF_SET_ONEDNN_FPMATH_MODE", "BF16"), r"TF_SET_ONEDNN_FPMATH_MODE"),
    *(
        (b, variable("ONEDNN_DEFAULT_FPMATH_MODE", "ANY"), r"ONEDNN_DEFAULT_FPMATH_MODE=ANY")
        for b in ("torch", "jax", "tensorflow")
    ),
]


@pytest.mark.parametrize(
    "switch, message", [s[1:] for s in SETTINGS if s[0] == keras.backend.backend()]
)
def test_settings_that_lower_float32_are_refused_by_name(switch, message):
    model, x = dense_network(0), np.ones((1, 24), f32)
    switch(True)
    try:
        with pytest.raises(ValueError, match=f"No float32 program can be .*{message}"):
            lip.certify(model, x, verbose=0, arithmetic="float32")
        assert lip.certify(model, x, verbose=0).arithmetic == "float64"
    finally:
        switch(False)
    assert lip.certify(model, x, verbose=0, arithmetic="float32").arithmetic == "float32"


def test_accelerators_are_refused(monkeypatch):
    from keras_lipnext.backend import precision

    monkeypatch.setattr(precision, "on_cpu", lambda: False)
    with pytest.raises(ValueError, match=r"accelerators may round .* compute on the CPU"):
        lip.certify(dense_network(0), np.ones((1, 24)), verbose=0, arithmetic="float32")


@pytest.mark.parametrize("layer", [kl.Conv2D, kl.Conv2DTranspose, kl.DepthwiseConv2D])
@pytest.mark.parametrize("batch", [1, 17])
def test_convolutions_are_sums_of_the_products_of_their_windows(layer, batch):
    """An entry of 2^40 changes no bit outside its windows: no Winograd's, no FFT's algorithm."""
    arguments = {} if layer is kl.DepthwiseConv2D else {"filters": 16}
    inputs = keras.Input((12, 12, 16))
    model = keras.Model(inputs, layer(kernel_size=3, padding="same", **arguments)(inputs))
    x = np.random.default_rng(0).normal(size=(batch, 12, 12, 16)).astype(f32)
    spiked = x.copy()
    spiked[:, 5, 6] = 2.0**40
    plain, spoiled = (to_numpy(model.predict_on_batch(v)) for v in (x, spiked))
    outside = np.ones((12, 12), bool)
    outside[4:7, 5:8] = False
    np.testing.assert_array_equal(plain[:, outside], spoiled[:, outside])
    assert (plain != spoiled)[:, 4:7, 5:8].any()


@pytest.mark.slow
def test_the_size_of_batches_changes_nothing_that_is_certified():
    """The backend's own program on one sample or many, near the radii."""
    model = small_lipnext(depth=1)
    x = np.random.default_rng(0).random((33, 8, 8, 1)).astype(f32)
    certificate = lip.certify(model, x, verbose=0, arithmetic="float32")
    moved = red_team.towards_boundary(model, x, certificate, 0.999).astype(f32)
    certified = certificate.radii > 0
    for size in (1, 5, 33):
        own = [model.predict_on_batch(moved[i : i + size]) for i in range(0, 33, size)]
        own = np.concatenate([to_numpy(o) for o in own]).argmax(axis=1)
        assert (own == certificate.predictions)[certified].all()


def test_a_program_in_float64_is_bounded_by_the_same_formulas():
    double, single = PROGRAMS["float64"].products(100), PROGRAMS["float32"].products(100)
    np.testing.assert_allclose(np.divide(single, double), 2.0**29, rtol=1e-4)
    assert not EVALUATION.program


def chain_of(*steps, dtype="float32", shape=(2,)):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *steps])


def float32_refused(model, x, message):
    with pytest.raises(ValueError, match=message):
        lip.certify(model, x, arithmetic="float32", verbose=0)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_a_program_that_cuts_off_fractions_is_refused(dtype):
    """At 127.9 this one answers as at 127."""
    model = chain_of(kl.Rescaling(1 / 255), kl.Dense(2), dtype=dtype, shape=(1,))
    model.layers[-1].set_weights([np.array([[0.0, 1]]), np.array([0.5, 0])])
    x = np.array([[128]], dtype)
    float32_refused(model, x, f"inputs of {dtype}: its program cuts off the fractions")
    assert lip.certify(model, x, verbose=0).radii[0] > 0


def test_factors_that_compilers_may_fold_stay_in_range():
    """XLA multiplies 2^64 with 2^64 first: infinity."""
    x = np.array([[1.0, 2.0]], "float32")
    up, down = kl.Rescaling(2.0**64), kl.Rescaling(2.0**-64)
    float32_refused(chain_of(up, down), x, r"factors beyond 2\^-16 to 2\^16")
    many = [kl.Rescaling(2.0**16), kl.Rescaling(2.0**-16)] * 4
    float32_refused(chain_of(*many), x, "more than 7 factors in a row")
    milder = [kl.Rescaling(2.0**8), kl.Rescaling(2.0**-8)] * 4
    apart = [*milder[:4], kl.Dense(2, kernel_initializer="identity"), *milder[4:]]
    certificate = lip.certify(chain_of(*apart), x, arithmetic="float32", verbose=0)
    assert certificate.radii[0] == pytest.approx(0.5**0.5, rel=1e-4)


def test_a_variance_near_minus_epsilon_is_off_by_more():
    """There float32 rounds epsilon by a large share of what is left of it."""
    errors = []
    for variance in (0.0, -0.999e-3):
        normalization = kl.BatchNormalization(epsilon=1e-3)
        model = chain_of(normalization, kl.Dense(2, kernel_initializer="identity"))
        gamma = np.sqrt(variance + 1e-3) * np.ones(2)
        normalization.set_weights([gamma, np.zeros(2), np.zeros(2), variance * np.ones(2)])
        x = np.array([[1.0, 2.0]], "float32")
        certificates = [lip.certify(model, x, arithmetic=a, verbose=0) for a in ("real", "float32")]
        errors.append(certificates[0].radii[0] - certificates[1].radii[0])
    assert errors[1] > 100 * errors[0]


def test_declared_parts_are_no_float32_program():
    class Parts(kl.Layer):
        def build(self, shape):
            self.dense = kl.Dense(2, use_bias=False, kernel_initializer="identity")
            self.dense.build(shape)

        def call(self, x):
            return (self.dense(x) + 64.0) - 64.0

        def compute_output_shape(self, shape):
            return shape

        def certified_parts(self):
            return (self.dense,)

    model = chain_of(Parts(name="parts"), kl.Dense(2))
    float32_refused(model, np.zeros((1, 2), "float32"), "Layer 'parts' .* is declared")


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="it has no such cast")
def test_casts_to_eight_bits_are_less_than_float32():
    inputs = keras.Input((2,))
    short = keras.ops.cast(keras.ops.cast(inputs, "float8_e4m3fn"), "float32")
    model = keras.Model(inputs, kl.Dense(2, kernel_initializer="identity")(short))
    x = np.array([[1.0, 2.0]], "float32")
    float32_refused(model, x, "computes in float8_e4m3fn")
    assert lip.certify(model, x, verbose=0).low_precision_differences == 0


def test_squares_that_underflow_beside_a_small_b_are_refused():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.ops.squareplus(inputs, b=0.0))
    for arithmetic in ARITHMETICS:
        with pytest.raises(ValueError, match=r"its b is 0\.0"):
            lip.certify(model, np.ones((1, 2)), arithmetic=arithmetic, verbose=0)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="of XLA")
@pytest.mark.parametrize(
    "flags", ["--xla_cpu_enable_fast_math", "--xla_cpu_enable_fast_math=1", "flags.txt"]
)
def test_fast_math_by_any_spelling_is_refused(flags, monkeypatch):
    model = chain_of(kl.Dense(2))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert lip.certify(model, np.ones((1, 2), "float32"), arithmetic="float32", verbose=0)
    monkeypatch.setenv("XLA_FLAGS", flags)
    float32_refused(model, np.ones((1, 2), "float32"), "XLA_FLAGS")


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of PyTorch")
def test_another_device_than_the_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("KERAS_TORCH_DEVICE", "xpu:0")
    float32_refused(chain_of(kl.Dense(2)), np.ones((1, 2), "float32"), "accelerators may round")


@pytest.mark.once
def test_an_epsilon_that_is_flushed_beside_squares_is_counted():
    """Two channels of one position: squares and epsilon below float32's normal numbers."""
    epsilon = 0.99 * 2.0**-126
    inputs = keras.Input((1, 1, 2))
    model = keras.Model(inputs, kl.Dense(2)(lip.layers.L2Pool(epsilon=epsilon)(inputs)))
    (bounds,), _ = measured(
        read(model).body, {0: (1, 1, 1, 2), 1: (1, 2)}, None, PROGRAMS["float32"]
    )
    lost = np.linalg.norm(np.sqrt([2 * epsilon] * 2))  # of x^2 = epsilon the program answers 0
    assert sum(bound.absolute for bound in bounds) >= lost


def test_nothing_overflows_in_the_ball_without_a_linear_head():
    """Weights of 2^27 four times over, then of 2^-27: K = 1, and NaN well inside of margin / K."""
    inputs = x = keras.Input((2,))
    layers = [keras.layers.Dense(2, use_bias=i == 7) for i in range(8)]
    for layer in layers:
        x = layer(x)
    model = keras.Model(inputs, keras.layers.LeakyReLU(0.5)(x))
    for i, layer in enumerate(layers):
        kernel = np.eye(2) * 2.0 ** (27 if i < 4 else -27)
        layer.set_weights([kernel] if i < 7 else [kernel, np.array([2.0**26, 0.0])])
    x = np.zeros((1, 2), "float32")
    certificate = lip.certify(model, x, arithmetic="float32", verbose=0)
    enclosure = lip.enclose(model, x, 1e7, arithmetic="float32", verbose=0)
    assert certificate.radii[0] == 0
    assert (enclosure.lower == -np.inf).all() and (enclosure.radius(0, 1e9) == 0).all()


@pytest.mark.parametrize("head", [False, True])
def test_sums_too_long_for_float32_name_their_layer(head):
    n = 180_000
    inputs = keras.Input((n, 1))
    x = kl.Flatten()(inputs) if head else lip.layers.L2Pool(name="long")(inputs)
    model = keras.Model(inputs, kl.Dense(2, name="long" if head else None)(x))
    with pytest.raises(ValueError, match=r"'long'.*float32 program: .* of 18\d{4} terms"):
        lip.certify(model, np.zeros((1, n, 1)), verbose=0, arithmetic="float32")
    assert lip.certify(model, np.zeros((1, n, 1)), verbose=0).radii.shape == (1,)
