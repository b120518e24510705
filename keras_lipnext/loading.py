"""Reads a model file and its data for an audit: what is damaged, partial or unsafe is refused."""

import importlib
import pathlib
import re
import sys
import tempfile
import warnings
import zipfile
import zlib

import h5py
import keras
import numpy as np

_WEIGHTS = "model.weights.h5"
_MEMBERS = ("config.json", "metadata.json", _WEIGHTS)

# What reading a damaged archive raises.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


def import_modules(names):
    """Imports modules that register layers and Lipschitz rules, from the working folder too.

    Raises:
        ValueError: naming the module, if one cannot be imported.
    """
    if names and "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(
                f"Module '{name}' cannot be imported: {type(error).__name__}: {error}"
            ) from error


def load_model(path):
    """Loads a model from a .keras file, certain that all its weights come from the file.

    Code in the file is refused: Keras' safe mode is on.

    Raises:
        ValueError: saying what is wrong with the file and what to do.
    """
    path = pathlib.Path(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing weights: an error below
            model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises whatever a tampered configuration leads to
        raise ValueError(f"{path}: {_explained(str(error))}") from error
    _check_weights(model, path)
    return model


def load_data(path, input_shape, limit=None):
    """Inputs and labels (None without) from an .npz file with the keys x and, optional, y.

    Args:
        path: File name.
        input_shape: Of the model, batch axis included.
        limit: Number of first samples to take; None takes all.

    Raises:
        ValueError: saying what is wrong with the file and what to do.
    """
    try:
        x, y = _read_npz(path)
        if y is not None and len(x) != len(y):
            raise ValueError(f"x and y must match. Received: {len(x)} inputs, {len(y)} labels")
        x, y = x[:limit], None if y is None else y[:limit]
        _check_inputs(x, input_shape)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file.") from None
    except (ValueError, *_DAMAGE) as error:
        raise ValueError(f"{path}: {error}") from error
    return x, y


def _check_archive(path):
    if path.suffix != ".keras":
        raise ValueError(f"{path}: expected a .keras file, as model.save('model.keras') writes.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    damaged = f"{path}: is truncated or damaged"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            broken = archive.testzip()
    except _DAMAGE as error:
        raise ValueError(f"{damaged}: {error}. Get the file anew.") from None
    if broken is not None:
        raise ValueError(f"{damaged}: the checksum of {broken} is wrong. Get the file anew.")
    if missing := [name for name in _MEMBERS if name not in names]:
        raise ValueError(
            f"{path}: is no complete Keras model, it lacks {', '.join(missing)}. "
            f"Received: {sorted(names)}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: holds a member twice, and which one counts is open: refused.")


def _explained(message):
    """What Keras says when a file does not load, made short."""
    message = message.rsplit("Exception encountered: ", 1)[-1].strip()
    if "arbitrary code execution" in message or "safe_mode" in message:
        return (
            "holds code of its own (a Lambda layer or the like), which would have to be run to "
            "load it: refused. Replace it by a registered layer class with a Lipschitz rule."
        )
    if missing := re.search(r"Could not locate (class|function) '([^']*)'", message):
        return (
            f"needs the {missing[1]} '{missing[2]}', which nothing here registers. Name the module "
            "that registers it, if you trust it: --import MODULE."
        )
    if failed := re.search(r"List of objects that could not be loaded:\s*\[(.*)\]", message, re.S):
        objects = ", ".join(re.findall(r"<(\w+ name=[^,>]+)", failed[1]))
        return (
            "its weights do not fit its configuration; they are missing, too many or of another "
            f"shape for: {objects}. The file was altered, or written by another model."
        )
    return (
        f"Keras cannot load it: {message.splitlines()[0][:400] if message else 'no reason given'}"
    )


def _check_weights(model, path):
    """The loaded weights, saved again, must be exactly the file's.

    Where a group of nested layers is missing Keras warns and keeps fresh random weights, and what
    no layer reads it passes over in silence.
    """
    with tempfile.TemporaryDirectory() as folder:
        again = pathlib.Path(folder, _WEIGHTS)
        model.save_weights(again)
        with (
            zipfile.ZipFile(path) as archive,
            archive.open(_WEIGHTS) as member,
            h5py.File(member, "r") as file,
            h5py.File(again, "r") as loaded,
        ):
            found, needed = _stored(file), _stored(loaded)
            if missing := sorted(needed.keys() - found.keys()):
                raise ValueError(
                    f"{path}: lacks weights of the model; Keras would leave random values in their "
                    f"place: {', '.join(missing)}"
                )
            if superfluous := sorted(found.keys() - needed.keys()):
                raise ValueError(
                    f"{path}: holds weights that no layer of its configuration reads: "
                    f"{', '.join(superfluous)}. Configuration and weights are not of one model."
                )
            for name, array in needed.items():
                if not _equal(array[()], found[name][()]):
                    raise ValueError(f"{path}: '{name}' was not loaded as it is stored.")


def _equal(a, b):
    """Whether two arrays hold the same values: the same bits, NaN too, if they share a dtype."""
    return a.tobytes() == b.tobytes() if a.dtype == b.dtype else np.array_equal(a, b)


def _stored(file):
    """{path: array} of the weights in an HDF5 file, those of the optimizer left out."""
    arrays = {}

    def collect(name, entry):
        if isinstance(entry, h5py.Dataset) and not name.startswith("optimizer/"):
            arrays[name] = entry

    file.visititems(collect)
    return arrays


def _read_npz(path):
    try:
        with open(path, "rb") as opened:  # NumPy leaves a damaged file open
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise ValueError("is a single array")
            arrays = {key: file[key] for key in file.files}
    except ValueError as error:
        # What NumPy says, of text files too: load it with pickle.
        reason = "holds Python objects" if "pickle" in str(error) else str(error)
        raise ValueError(
            f"no .npz file of plain arrays ({reason}): numpy.savez(file, x=inputs, y=labels)"
        ) from error
    if "x" not in arrays or arrays.keys() - {"x", "y"}:
        raise ValueError(
            "must hold inputs as x and, optional, labels as y, nothing else. "
            f"Received: {sorted(arrays)}"
        )
    if scalars := [key for key, array in arrays.items() if array.ndim == 0]:
        raise ValueError(f"{scalars[0]} must have a batch axis. Received: a single value")
    y = arrays.get("y")
    if y is not None and y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("y must be finite. Received: labels that are NaN or infinite")
    return arrays["x"], y


def _check_inputs(x, input_shape):
    shape = ", ".join(map(str, ("n", *input_shape[1:])))
    fits = x.ndim == len(input_shape) and all(
        n is None or n == m for n, m in zip(input_shape[1:], x.shape[1:])
    )
    if not fits:
        raise ValueError(f"the model takes x of shape ({shape}). Received: shape {x.shape}")
    if x.dtype.kind not in "biuf":
        raise ValueError(f"x must be real numbers. Received: dtype {x.dtype}")
    if x.size == 0:
        raise ValueError(f"there is nothing to certify. Received: x of shape {x.shape}")
    if not np.isfinite(x).all():
        samples = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        raise ValueError(
            f"x must be finite. Received: NaN or infinity in {len(samples)} of {len(x)} samples, "
            f"the first at index {samples[0]}"
        )
