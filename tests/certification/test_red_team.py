"""Programs that differ by what nobody fixes: threads, batches, backends, constants folded."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import red_team
from data import small_lipnext, to_numpy
from red_team import ORDERS, evaluated, f32, folded, steps_of

import keras_lipnext as lip
from keras_lipnext.lipschitz.model import read
from keras_lipnext.lipschitz.program import program_arithmetic
from keras_lipnext.norms.roundoff import PROGRAMS
from keras_lipnext.twin import Float64Twin

kl = keras.layers
BACKEND = keras.backend.backend()
OTHER = "jax" if BACKEND == "torch" else "torch"


def every_order(steps):
    return {
        f"folded, {order}": functools.partial(evaluated, steps, order=order) for order in ORDERS
    }


@pytest.mark.parametrize("seed", range(3))
def test_factors_multiplied_into_kernels(seed):
    """By hand in every order, and by whatever the backend compiles."""
    model, x = red_team.factors(seed)
    steps = steps_of(model)
    assert len(folded(steps)) == 3 and len(steps) == 8
    certificate = red_team.survives(model, x, others=every_order(folded(steps)))
    assert (certificate.radii > 0).sum() > 6


def test_factors_cross_the_radii_of_real_arithmetic():
    """In some network: how a processor sums decides in which."""

    def crossed(seed):
        model, x = red_team.factors(seed)
        others = every_order(folded(steps_of(model)))
        try:
            red_team.survives(model, x, others=others, arithmetic="real")
        except AssertionError as error:
            return ": [" in str(error)
        return False

    assert any(map(crossed, range(3)))


@pytest.mark.once
def test_each_factor_that_was_folded_is_counted():
    """Seven from either side round a positive product up, and a negative one that cancels it."""
    rng = np.random.default_rng(1)
    weights, exact = (np.ones(2, dtype) for dtype in (f32, "float64"))
    for _ in range(14):
        factors = rng.uniform(0.5, 2, 4000).astype(f32)
        products = weights[:, None] * factors
        apart = products / (weights[:, None].astype("float64") * factors)
        chosen = [0, 1], [apart[0].argmax(), apart[1].argmin()]
        weights, exact = products[chosen], exact * factors[chosen[1]]
    off, magnitudes = abs(weights / exact @ np.array([1, -1])), 2.0
    allowed = {
        k: dataclasses.replace(PROGRAMS["float32"], factors=k).products(2)[0] for k in (0, 3, 7)
    }
    assert allowed[0] * magnitudes < allowed[3] * magnitudes < off < allowed[7] * magnitudes


def test_factors_in_a_row_are_counted_in_every_sum():
    """Means are factors, too; and those of each model are in the radii of its programs."""
    layers = [
        kl.Conv2D(3, 1),
        kl.BatchNormalization(),
        kl.AveragePooling2D((1, 3)),
        kl.Rescaling(0.3),
    ]
    exact = [kl.Rescaling(0.5), kl.Rescaling([4.0, 1.0, -0.25]), kl.AveragePooling2D(2)]
    last = [kl.GlobalAveragePooling2D(), kl.Dense(2)]
    model = keras.Sequential([keras.Input((2, 6, 3)), *layers, *exact, *last])
    for arithmetic in PROGRAMS:
        assert program_arithmetic(arithmetic, read(model)).factors == 4
        assert program_arithmetic(arithmetic, read(small_lipnext())).factors == 0
    assert program_arithmetic("real", read(model)) is None


def test_wrapped_factors_and_weighted_means_are_counted():
    inside = [kl.TimeDistributed(kl.Rescaling(0.3)) for _ in range(8)]
    wrapped = keras.Sequential([keras.Input((2, 3)), *inside, kl.Flatten(), kl.Dense(2)])
    means = [kl.AdaptiveAveragePooling2D(2), kl.UpSampling2D(2, interpolation="bilinear")]
    nested = [kl.TimeDistributed(kl.TimeDistributed(kl.AveragePooling1D(3))), kl.Flatten()]
    sizes = {"means": ((4, 4, 1), [*means, kl.Flatten()]), "nested": ((1, 1, 3, 1), nested)}
    with pytest.raises(ValueError, match="more than 7 factors in a row"):
        program_arithmetic("float32", read(wrapped))
    assert program_arithmetic("float64", read(wrapped)).factors == 8
    for name, expected in (("means", 2), ("nested", 1)):
        shape, layers = sizes[name]
        model = keras.Sequential([keras.Input(shape), *layers, kl.Dense(2)])
        assert program_arithmetic("float64", read(model)).factors == expected


def between(model, x, first, second):
    """A model of two classes that two programs decide differently, its sample, and their classes.

    `model` answers one sum, and `first` and `second` are two programs' answers to x.
    """
    (row, *_) = np.flatnonzero(first != second)
    (dense,) = model.layers
    kernel = np.concatenate([to_numpy(dense.kernel)] * 2, axis=1) * f32([1, 0])
    decided = keras.Sequential([keras.Input(model.input_shape[1:]), kl.Dense(2)])
    larger = max(first[row], second[row])
    decided.layers[0].set_weights([kernel, np.array([0, larger], f32)])
    # Of equal logits the first is the largest.
    return decided, x[row : row + 1], [int(z[row] < larger) for z in (first, second)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(models with inputs near the borders of their radii, {program: {name: answers}})."""
    if importlib.util.find_spec(OTHER) is None:
        pytest.skip(f"another backend, {OTHER}, is not installed")
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    total = keras.Sequential([keras.Input((1024,)), kl.Dense(1, kernel_initializer="zeros")])
    total.layers[0].kernel.assign(rng.normal(size=(1024, 1)))
    models = {"sum": (total, rng.normal(size=(64, 1024)).astype(f32), None)}
    for name, (model, x) in {"factors": red_team.factors(7), "wide": wide()}.items():
        certificate = lip.certify(model, x, arithmetic="float32", verbose=0)
        moved = red_team.towards_boundary(model, x, certificate)
        near = red_team.neighbours(x.astype("float64"), moved, certificate.radii, rng)
        models[name] = model, np.concatenate([moved, near]).astype(f32), certificate
    for name, (model, x, _) in models.items():
        model.save(folder / f"{name}.keras")
        np.save(folder / f"{name}.npy", x)
    found = {}
    for program, answer in (("at once", at_once), ("one by one", one_by_one)):
        found[program] = {name: answer(model, x) for name, (model, x, _) in models.items()}
    script = pathlib.Path(__file__).with_name("other_programs.py")
    others = {}
    for title, backend in (("threads", BACKEND), ("backend", OTHER)):
        results = tmp_path_factory.mktemp(title)
        # As programs are compiled outside of this suite, too.
        settings = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        settings |= {
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "4",
            "TF_NUM_INTRAOP_THREADS": "4",
        }
        command = [sys.executable, str(script), str(folder), str(results)]
        process = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
        others[title] = process, results
    for title, (process, results) in others.items():
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        files = {name: np.load(results / f"{name}.npz") for name in models}
        for size in ("at once", "one by one"):
            found[f"{title}, {size}"] = {name: files[name][size] for name in models}
    return models, found


def wide():
    """(model, x): a sum long enough to be dealt out to threads, its classes nearly alike."""
    rng = np.random.default_rng(3)
    inputs = keras.Input((2048,))
    model = keras.Model(inputs, kl.Dense(2, kernel_initializer="zeros")(inputs))
    common = rng.normal(size=2048)
    kernel = np.stack([common, common + rng.normal(size=2048)], axis=1)
    model.layers[-1].set_weights([kernel, np.zeros(2)])
    return model, rng.normal(size=(12, 2048)).astype(f32)


def at_once(model, x):
    return to_numpy(model.predict_on_batch(x))


def one_by_one(model, x):
    return np.concatenate([at_once(model, row) for row in np.split(x, len(x))])


@pytest.mark.slow
def test_no_thread_batch_or_backend_leaves_a_certified_class(answers):
    models, found = answers
    for program, logits in found.items():
        for name in ("factors", "wide"):
            certificate = models[name][2]
            predictions = logits[name].argmax(axis=1).reshape(2, -1)
            certified = certificate.radii > 0
            assert certified.sum() > 6
            assert (predictions == certificate.predictions)[:, certified].all(), (program, name)


@pytest.mark.slow
def test_what_they_decide_is_certified_by_the_naive_rule_alone(answers):
    """Each two programs that differ in a bit: one of them leaves a class of real arithmetic."""
    models, found = answers
    model, x, _ = models["sum"]
    reference, decided = found["at once"]["sum"][:, 0], set()
    for program, logits in found.items():
        other = logits["sum"][:, 0]
        if (other == reference).all():
            continue
        decided.add(program)
        pair, sample, classes = between(model, x, reference, other)
        naive, certificate = (
            lip.certify(pair, sample, arithmetic=a, verbose=0) for a in ("real", "float32")
        )
        assert naive.radii[0] > 0 and set(classes) == {0, 1}
        assert certificate.radii[0] == 0
    assert "backend, at once" in decided and len(decided) > 1


@pytest.mark.slow
def test_no_program_leaves_a_certified_class_of_a_trained_network(digits):
    (x, y), (x_test, _) = digits
    layers = [kl.Dense(24, activation="relu"), lip.layers.BetaAbs(0.5), kl.Dense(24), kl.Dense(10)]
    model = keras.Sequential([keras.Input((64,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss)
    model.fit(x.reshape(-1, 64), y, epochs=3, verbose=0)
    x = x_test[:24].reshape(-1, 64).astype("float64")
    points = np.concatenate(
        [beside_the_border(Float64Twin(model), x, 10.0**-k) for k in range(3, 9)]
    )
    certified = red_team.survives(model, points, rounds=1).radii > 0
    assert 0.2 < certified.mean() < 0.8
    with pytest.raises(AssertionError, match=r": \["):
        red_team.survives(model, points, rounds=1, arithmetic="real")


def beside_the_border(twin, x, share):
    """Points between samples and others, just in front of where the class changes."""
    classes = twin(x).argmax(axis=1)
    other = np.roll(x, 1, axis=0)
    keep = classes != twin(other).argmax(axis=1)
    x, other, classes = x[keep], other[keep], classes[keep]
    low, high = np.zeros((len(x), 1)), np.ones((len(x), 1))
    for _ in range(50):
        middle = (low + high) / 2
        same = (twin(x + middle * (other - x)).argmax(axis=1) == classes)[:, None]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    return x + (low - share) * (other - x)
