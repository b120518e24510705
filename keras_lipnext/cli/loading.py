"""Reads a model file and its data for an audit: what is damaged, partial or unsafe is refused."""

import contextlib
import hashlib
import importlib
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
import zlib

import h5py
import keras
import numpy as np

from keras_lipnext.models import presets
from keras_lipnext.models.built import BuiltModel
from keras_lipnext.report.provenance import File

_WEIGHTS = "model.weights.h5"
_MEMBERS = ("config.json", "metadata.json", _WEIGHTS)

# The names of inputs in an .npz file that need no --x-key, and of the labels beside them.
_LABELS_OF = {"x": "y", "x_test": "y_test"}
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

    Code in the file is refused: Keras' safe mode is on. The name of a preset, or a preset's folder,
    will do in place of a file.

    Raises:
        ValueError: saying what is wrong with the file and what to do.
    """
    if presets.is_preset(path):
        return BuiltModel.from_preset(path)
    path = pathlib.Path(path)
    _check_archive(path)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")  # of missing weights: an error below
            named = path
            if path.suffix != ".keras":  # Keras knows no model.KERAS
                named = shutil.copyfile(path, pathlib.Path(folder, "model.keras"))
            model = keras.models.load_model(named, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises whatever a tampered configuration leads to
        raise ValueError(f"{path}: {_explained(str(error))}") from error
    _check_weights(model, path)
    return model


def model_file(path):
    """The `File` of a model: of a preset, that of its weights."""
    weights = presets.folder_of(path) / presets.WEIGHTS if presets.is_preset(path) else path
    with open(weights, "rb") as opened:
        return File("model", str(path), hashlib.file_digest(opened, "sha256").hexdigest())


def load_data(path, input_shape, limit=None, x_key=None, y_key=None, labels=None):
    """Inputs and labels from .npz or .npy files.

    Args:
        path: Name of an .npz file, whose other arrays are left unread, or of an .npy file of
            inputs.
        input_shape: Of the model, batch axis included.
        limit: Number of first samples to take; None takes all.
        x_key, y_key: Names of inputs and labels in the .npz file. None takes x and y, or x_test
            and y_test; labels may be missing.
        labels: Name of an .npy file of labels, in place of those in `path`.

    Returns:
        (inputs, labels or None, tuple of `File`).

    Raises:
        ValueError: saying what is wrong with the files and what to do.
    """
    with _explaining(path), _loaded(path) as (file, digest):
        if isinstance(file, np.ndarray):
            if x_key or y_key:
                raise ValueError("is a single array: --x-key and --y-key are for .npz files")
            x, y, names = file, None, ()
        else:
            names = _chosen(file.files, x_key, y_key, labels is not None)
            x, y = (*(file[name] for name in names), None)[:2]
    files = (File("data", str(path), digest, names),)
    if labels is not None:
        with _explaining(labels), _loaded(labels) as (y, digest):
            if not isinstance(y, np.ndarray):
                raise ValueError("must be an .npy file of labels. Received: an archive")
            _check_labels(x, y)
        files += (File("labels", str(labels), digest),)
    with _explaining(path):
        _check_labels(x, y)
        x, y = x[:limit], None if y is None else y[:limit]
        _check_inputs(x, input_shape)
    return x, y, files


@contextlib.contextmanager
def _explaining(path):
    """What goes wrong inside is a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file.") from None
    except (ValueError, *_DAMAGE) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_archive(path):
    if path.suffix.lower() != ".keras":
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


@contextlib.contextmanager
def _loaded(path):
    """(array of an .npy file, or an open .npz file; SHA-256 in hex)."""
    try:
        with open(path, "rb") as opened:  # NumPy leaves a damaged file open
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            opened.seek(0)
            file = np.load(opened, allow_pickle=False)
            yield file, digest
    except ValueError as error:
        # What NumPy says, of text files too: load it with pickle.
        if "pickle" not in str(error):
            raise
        raise ValueError(
            "no .npz or .npy file of plain arrays (holds Python objects): "
            "numpy.savez(file, x=inputs, y=labels)"
        ) from error


def _chosen(names, x_key, y_key, has_labels):
    """Names of the inputs and, if there are any, the labels among the arrays of an .npz file."""
    if has_labels and y_key:
        raise ValueError("labels are asked for twice, by --labels and by --y-key")
    usual = [name for name in _LABELS_OF if name in names]
    if x_key is None and len(usual) != 1:
        reason = f"both {' and '.join(usual)}" if usual else "no inputs named x or x_test"
        raise ValueError(f"holds {reason}: choose by --x-key. Received: {sorted(names)}")
    x_key = x_key or usual[0]
    for name in (x_key, y_key):
        if name is not None and name not in names:
            raise ValueError(f"holds no array '{name}'. Received: {sorted(names)}")
    y_key = y_key or _LABELS_OF.get(x_key)
    return (x_key, y_key) if y_key in names and not has_labels else (x_key,)


def _check_labels(x, y):
    for name, array in (("x", x), ("y", y)):
        if array is not None and array.ndim == 0:
            raise ValueError(f"{name} must have a batch axis. Received: a single value")
    if y is not None and y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("y must be finite. Received: labels that are NaN or infinite")
    if y is not None and len(x) != len(y):
        raise ValueError(f"x and y must match. Received: {len(x)} inputs, {len(y)} labels")


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
