"""A model saved on this backend certifies and trains on the other two."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from data import small_lipnext

from keras_lipnext.certification.float64 import Float64Twin

BACKENDS = ("jax", "torch", "tensorflow")


@pytest.fixture(scope="module", params=["reduced", "full"])
def saved(request, digits, tmp_path_factory):
    keras.utils.set_random_seed(1)
    (x, y), (x_test, y_test) = digits
    folder = tmp_path_factory.mktemp("saved")
    model = small_lipnext(width=32, mixing=request.param)
    model.fit(x, y, epochs=2, batch_size=64, verbose=0)
    model.save(folder / "model.keras")
    x, y = x_test[:200], y_test[:200]
    np.savez(folder / "data.npz", x=x, y=y)
    return folder, model, model.certify(x, y, verbose=0), Float64Twin(model)(x)


@pytest.mark.parametrize("other", [b for b in BACKENDS if b != keras.backend.backend()])
def test_same_certificate_on_another_backend(other, saved):
    folder, model, certificate, logits = saved
    script = pathlib.Path(__file__).with_name("certify_file.py")
    files = [str(folder / name) for name in ("model.keras", "data.npz", f"{other}.npz")]
    done = subprocess.run(
        [sys.executable, str(script), *files],
        env={**os.environ, "KERAS_BACKEND": other},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = np.load(files[-1])
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
