"""Trained models in folders: those of the package, a user's own, and those on Hugging Face.

A folder holds, by the names of keras-hub,

    config.json         the model's class and the arguments it was built from
    model.weights.h5    its weights, as `save_weights` writes them
    metadata.json       versions, number of weights, and what who saved it had to say
    certificate.json    what was certified of it, if anything, with the hash of its weights
"""

import datetime
import inspect
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import keras

from keras_lipnext.installation import installing
from keras_lipnext.lipschitz.model import read
from keras_lipnext.report.certificate import Certificate
from keras_lipnext.report.provenance import check_hash
from keras_lipnext.version import __version__

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
METADATA, CERTIFICATE = "metadata.json", "certificate.json"
BUNDLED = pathlib.Path(__file__).parents[1] / "trained"
REMOTE = "hf://"


def names() -> list[str]:
    """Names of the presets of the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{CONFIG}"))


def is_preset(preset: str | pathlib.Path) -> bool:
    """Whether `from_preset` would look for something by this name."""
    known = preset in names() or str(preset).startswith(REMOTE)
    return known or pathlib.Path(preset, CONFIG).is_file()


def folder_of(preset: str | pathlib.Path) -> pathlib.Path:
    """The folder of a preset, fetched first if it is a remote one.

    Raises:
        ValueError: if there is none, with the names there are.
        ImportError: if it is a remote one and huggingface_hub is not installed.
        OSError: if it cannot be fetched.
    """
    if str(preset).startswith(REMOTE):
        return _fetched(str(preset)[len(REMOTE) :])
    for folder in (BUNDLED / str(preset), pathlib.Path(preset)):
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(
        f"`preset` must be one of {', '.join(names())}, a folder that `save_to_preset` wrote, or "
        f"'hf://owner/name'. Received: preset={str(preset)!r}"
    )


def _fetched(repository):
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"'{REMOTE}' needs huggingface_hub: {installing('hub')}") from error
    try:
        files = [CONFIG, WEIGHTS, METADATA, CERTIFICATE]
        return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # of many kinds: no network, no such repository, no permission
        raise OSError(
            f"{REMOTE}{repository} cannot be fetched, and no copy is kept here: "
            f"{type(error).__name__}: {error}"
        ) from error


def described(preset: str | pathlib.Path) -> dict[str, Any]:
    """A preset's config, metadata and certificate (None without one)."""
    folder = folder_of(preset)
    paths = {name: folder / f"{name}.json" for name in ("config", "metadata", "certificate")}
    found = {name: _json(path) if path.is_file() else None for name, path in paths.items()}
    for name in ("config", "metadata"):
        if not isinstance(found[name], dict):
            raise ValueError(f"{paths[name]} is missing or holds no JSON object")
    return found


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def load(preset: str | pathlib.Path, kind: Any, load_weights: bool = True) -> Any:
    """The model of a preset, compiled as its class compiles what it builds.

    Args:
        preset: As `folder_of` takes it.
        kind: Class that the model must have, or a class above it.
        load_weights: Whether to load the weights; else they are random.

    Raises:
        ValueError: if the folder holds another kind of model, or weights that are not those of its
            certificate.
    """
    found = described(preset)
    name = found["config"].get("registered_name")
    made: Any = keras.saving.get_registered_object(name)
    fits = inspect.isclass(made) and issubclass(made, kind)
    if not fits:
        raise ValueError(
            f"The preset {str(preset)!r} holds a model of class {name}, not a {kind.__name__}. "
            "Load it with `from_preset` of its own class."
        )
    model = made.from_config(found["config"]["config"])
    if load_weights:
        model.load_weights(folder_of(preset) / WEIGHTS)
        if found["certificate"] is not None:
            check_hash(read(model), found["certificate"]["evidence"]["weights_hash"])
    model.compile_as_built()
    return model


def save(
    model: Any,
    folder: str | pathlib.Path,
    certificate: Certificate | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `load` reads.

    Raises:
        ValueError: if the certificate is of other weights.
    """
    if certificate is not None and certificate.evidence is not None:
        check_hash(read(model), certificate.evidence.weights_hash)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = keras.saving.serialize_keras_object(model)
    config = {key: config[key] for key in ("module", "class_name", "config", "registered_name")}
    facts = {
        "keras_version": keras.__version__,
        "keras_lipnext_version": __version__,
        "parameter_count": model.count_params(),
        "date_saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(metadata or {}),
    }
    for name, content in ((CONFIG, config), (METADATA, facts)):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    # Keras writes an optimizer's state among the weights: a model that was not compiled has none.
    bare = type(model).from_config(model.get_config())
    for target, source in zip(bare.weights, model.weights, strict=True):
        target.assign(keras.ops.convert_to_numpy(source))
    bare.save_weights(folder / WEIGHTS)
    if certificate is None:
        (folder / CERTIFICATE).unlink(missing_ok=True)  # of the weights that were there before
    else:
        certificate.to_json(folder / CERTIFICATE)


class Presets:
    """Class attribute: {name: metadata} of the package's presets that hold the class' models."""

    def __get__(self, instance: Any, owner: type) -> dict[str, dict[str, Any]]:
        found = {name: described(name) for name in names()}
        kinds = {
            name: keras.saving.get_registered_object(content["config"].get("registered_name"))
            for name, content in found.items()
        }
        return {n: found[n]["metadata"] for n, made in kinds.items() if issubclass(made, owner)}
