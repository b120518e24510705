"""Which backend is taken, and what is said where it is not installed."""

import os
import subprocess
import sys

import pytest

from keras_lipnext import installation

pytestmark = pytest.mark.once

# Backends in the list are hidden, as if they were not installed.
HIDE = """
import os, sys
os.environ.pop("KERAS_BACKEND", None)
os.environ.update({settings})
for name in {hidden}:
    sys.modules[name] = None
"""


def run(code, hidden=(), tmp_path=None, **settings):
    settings = {"KERAS_HOME": str(tmp_path), **settings}
    done = subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=list(hidden), settings=settings) + code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_tensorflow_is_taken_but_not_installed(tmp_path):
    status, _, err = run("import keras_lipnext", ["tensorflow", "jax"], tmp_path)
    assert status == 1
    assert err.splitlines()[-1] == (
        "ImportError: Keras is to compute with tensorflow, which is not installed. Installed: "
        "torch. Type: export KERAS_BACKEND=torch"
    )
    assert len(err.splitlines()) < 20


@pytest.mark.slow
def test_the_command_takes_what_is_installed(tmp_path):
    code = """
sys.argv = ["/usr/bin/lipnext", "inspect", "absent.keras"]
from keras_lipnext.cli import main
import keras
print(keras.backend.backend())
sys.exit(main())
"""
    status, out, err = run(code, ["tensorflow", "jax"], tmp_path)
    assert (status, out) == (1, "torch\n")
    assert err.splitlines()[-1] == "lipnext: error: absent.keras: no such file."
    # A backend that was named is not replaced by another.
    status, out, err = run(code, ["jax"], tmp_path, KERAS_BACKEND="jax")
    assert (status, out) == (1, "")
    assert err == (
        "lipnext: error: Keras is to compute with jax, which is not installed. Installed: "
        "tensorflow, torch. Type: export KERAS_BACKEND=tensorflow\n"
    )


@pytest.mark.slow
def test_nothing_is_installed(tmp_path):
    status, _, err = run("import keras_lipnext", installation.BACKENDS, tmp_path)
    assert status == 1
    assert err.splitlines()[-1].endswith(
        "which is not installed. Nor is jax or torch. pip install 'keras_lipnext[jax]' (in the "
        "repository: pip install -e '.[jax]')"
    )


@pytest.mark.parametrize(
    "content, backend",
    [
        ('{"backend": "jax"}', "jax"),
        ("{}", "tensorflow"),
        ("[]", "tensorflow"),
        ("damaged", "tensorflow"),
        (None, "tensorflow"),
    ],
)
def test_the_backend_is_that_which_keras_would_take(content, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if content is not None:
        (tmp_path / "keras.json").write_text(content)
    assert installation.configured() == backend
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    assert installation.configured() == "torch"


@pytest.mark.parametrize(
    "argv, original, expected",
    [
        (["/usr/bin/lipnext", "inspect"], ["python", "/usr/bin/lipnext"], True),
        (["C:/lipnext.exe"], ["python"], True),
        (["-m"], ["python", "-W", "ignore", "-m", "keras_lipnext", "inspect"], True),
        (["train.py"], ["python", "train.py"], False),
        (["-m"], ["python", "-m", "pytest"], False),
        (["-c"], ["python", "-m"], False),
        ([""], ["python"], False),
    ],
)
def test_the_command_knows_itself(argv, original, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert installation.is_command() == expected
