"""A model saved on this backend certifies and trains on the other two."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from data import small_lipnext

from keras_lipnext.twin import Float64Twin

# One source is enough: each backend reads and computes; tests/golden pins what all have to find.
pytestmark = [pytest.mark.once, pytest.mark.slow]
OTHERS = [b for b in ("jax", "torch", "tensorflow") if b != keras.backend.backend()]
MIXINGS = ("reduced", "full")


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    """The folder with a trained model of each mixing, and these with their certificates."""
    keras.utils.set_random_seed(1)
    (x, y), (x_test, y_test) = digits
    folder = tmp_path_factory.mktemp("saved")
    x_test, y_test = x_test[:64], y_test[:64]
    np.savez(folder / "data.npz", x=x_test, y=y_test)
    models = {}
    for mixing in MIXINGS:
        model = small_lipnext(depth=1, mixing=mixing)
        model.fit(x, y, epochs=2, batch_size=64, verbose=0)
        model.save(folder / f"{mixing}.keras")
        certificate = model.certify(x_test, y_test, verbose=0)
        models[mixing] = model, certificate, Float64Twin(model)(x_test)
    return folder, models


@pytest.fixture(scope="module", params=OTHERS)
def read(request, saved):
    """The other backend, and what it finds in each model."""
    folder, _ = saved
    results = [folder / f"{mixing}-{request.param}.npz" for mixing in MIXINGS]
    files = [str(f) for m, r in zip(MIXINGS, results) for f in (folder / f"{m}.keras", r)]
    script = pathlib.Path(__file__).with_name("certify_file.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "data.npz"), *files],
        env={**os.environ, "KERAS_BACKEND": request.param},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, dict(zip(MIXINGS, map(np.load, results)))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_same_certificate_on_another_backend(mixing, saved, read):
    model, certificate, logits = saved[1][mixing]
    other, result = read[0], read[1][mixing]
    assert str(result["backend"]) == other
    np.testing.assert_array_equal(result["predictions"], certificate.predictions)
    # In float64 they agree far below the 1e-6 asked for.
    np.testing.assert_allclose(result["radii"], certificate.radii, atol=1e-12)
    assert certificate.radii.max() > 0.1
    # The same bits, by their hash; logits within what each side allows for rounding.
    assert str(result["weights_hash"]) == certificate.evidence.weights_hash
    allowed = certificate.error_allowances + result["allowances"]
    assert (abs(result["logits"] - logits).max(axis=1) <= allowed).all()
    np.testing.assert_array_equal(result["radii"] > 0, certificate.radii > 0)
    assert float(result["body_constant"]) == pytest.approx(certificate.body_constant, rel=1e-9)
    assert int(result["iterations"]) == int(model.optimizer.iterations)
    assert np.isfinite(result["loss"]).all()
