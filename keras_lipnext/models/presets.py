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
import tempfile
from collections.abc import Mapping
from typing import Any

import keras

from keras_lipnext.installation import installing
from keras_lipnext.lipschitz.model import read
from keras_lipnext.report.certificate import Certificate
from keras_lipnext.report.provenance import check_hash, policies
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
    known = _is_bundled(preset) or str(preset).startswith(REMOTE)
    return known or pathlib.Path(preset, CONFIG).is_file()


def _is_bundled(preset):
    """A name alone, as it stands: "./name" and `Path("name")` are folders."""
    return isinstance(preset, str) and preset in names()


def folder_of(preset: str | pathlib.Path) -> pathlib.Path:
    """The folder of a preset, fetched first if it is a remote one.

    Raises:
        ValueError: if there is none, with the names there are, or if a folder here has its name.
        ImportError: if it is a remote one and huggingface_hub is not installed.
        OSError: if it cannot be fetched.
    """
    if str(preset).startswith(REMOTE):
        return _fetched(str(preset)[len(REMOTE) :])
    folder = pathlib.Path(preset)
    if _is_bundled(preset):
        if (folder / CONFIG).is_file():
            raise ValueError(
                f"{preset!r} is a preset of the package and a folder here. Name the folder "
                f"'./{preset}', or look for the preset from elsewhere."
            )
        return BUNDLED / preset
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
    for name, content in found.items():
        if not isinstance(content, dict) and (name, content) != ("certificate", None):
            raise ValueError(f"{paths[name]} is missing or holds no JSON object")
    return found


def _json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def _check_certified(model, certificate, path):
    """ValueError unless the certificate is of the model's weights, in its dtypes."""
    evidence = certificate.get("evidence")
    evidence = evidence if isinstance(evidence, dict) else {}
    expected, dtypes = evidence.get("weights_hash"), evidence.get("dtypes")
    if not isinstance(expected, str) or not isinstance(dtypes, list):
        raise ValueError(
            f"{path} does not say of which weights and dtypes it is: nothing is proven"
        )
    certifiable = read(model)
    check_hash(certifiable, expected)
    if (found := list(policies(certifiable))) != dtypes:
        raise ValueError(f"{path} is of layers of {dtypes}, these are of {found}")


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
    folder = folder_of(preset)
    found = described(folder)
    name, config = (found["config"].get(key) for key in ("registered_name", "config"))
    if not isinstance(name, str) or not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} does not name a class and its config")
    made: Any = keras.saving.get_registered_object(name)
    fits = inspect.isclass(made) and issubclass(made, kind)
    if not fits:
        raise ValueError(
            f"The preset {str(preset)!r} holds a model of class {name}, not a {kind.__name__}. "
            "Load it with `from_preset` of its own class, in whose module it is registered."
        )
    model = made.from_config(config)
    if load_weights:
        model.load_weights(folder / WEIGHTS)
        if found["certificate"] is not None:
            _check_certified(model, found["certificate"], folder / CERTIFICATE)
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
        ValueError: if the certificate is of other weights, or the class is not registered.
        TypeError: if the metadata is more than JSON can hold.
    """
    certified = None if certificate is None else certificate.to_dict()
    if certified is not None:
        _check_certified(model, certified, "The certificate")
    config = keras.saving.serialize_keras_object(model)
    config = {key: config[key] for key in ("module", "class_name", "config", "registered_name")}
    if keras.saving.get_registered_object(config["registered_name"]) is not type(model):
        raise ValueError(
            f"{type(model).__name__} is not registered, and could not be loaded: decorate it with "
            "keras.saving.register_keras_serializable"
        )
    facts = {
        **(metadata or {}),
        "keras_version": keras.__version__,
        "keras_lipnext_version": __version__,
        "parameter_count": model.count_params(),
        "date_saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    texts = {
        name: json.dumps(content, indent=2, ensure_ascii=False)
        for name, content in ((CONFIG, config), (METADATA, facts))
    }
    # Keras writes an optimizer's state among the weights: a model that was not compiled has none.
    bare = type(model).from_config(model.get_config())
    for target, source in zip(bare.weights, model.weights, strict=True):
        target.assign(keras.ops.convert_to_numpy(source))
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # All of it is written before anything of an earlier preset is replaced.
    with tempfile.TemporaryDirectory(dir=folder) as made:
        new = pathlib.Path(made)
        bare.save_weights(new / WEIGHTS)
        for name, text in texts.items():
            (new / name).write_text(text + "\n", encoding="utf-8")
        if certificate is not None:
            certificate.to_json(new / CERTIFICATE)
        (folder / CERTIFICATE).unlink(missing_ok=True)  # of the weights that were there before
        for path in new.iterdir():
            path.replace(folder / path.name)


class Presets:
    """Class attribute: {name: metadata} of the package's presets that hold the class' models."""

    def __get__(self, instance: Any, owner: type) -> dict[str, dict[str, Any]]:
        found = {name: described(name) for name in names()}
        kinds = {
            name: keras.saving.get_registered_object(content["config"].get("registered_name"))
            for name, content in found.items()
        }
        return {n: found[n]["metadata"] for n, made in kinds.items() if issubclass(made, owner)}
