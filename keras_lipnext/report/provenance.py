"""What a certificate rests on, for the report: the weights' hash, versions, constants, samples."""

import dataclasses

import keras
import numpy as np

from keras_lipnext.lipschitz.bounds import LipschitzBound
from keras_lipnext.lipschitz.graph import HASH_FORMAT
from keras_lipnext.version import __version__


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was certified, and with what.

    Attributes:
        model: Name of the model.
        parameters: Number of its weights.
        weights_hash: SHA-256 of its layers' configurations and stored weights, in hex, behind the
            version of the hash's format and a colon: "2:...".
        dtypes: The dtype policies of its layers.
        input_shape: With batch axis.
        backend: Keras backend that evaluated it.
        versions: {package: version}.
        bound: `LipschitzBound`, with the constant of each layer.
    """

    model: str
    parameters: int
    weights_hash: str
    dtypes: tuple
    input_shape: tuple
    backend: str
    versions: dict
    bound: LipschitzBound

    @classmethod
    def of(cls, model, certifiable, bound):
        """Collects the evidence."""
        backend = keras.backend.backend()
        return cls(
            model=model.name,
            parameters=model.count_params(),
            weights_hash=certifiable.graph.digest(),
            dtypes=policies(certifiable),
            input_shape=certifiable.graph.input_shape,
            backend=backend,
            versions={
                "keras_lipnext": __version__,
                "keras": keras.__version__,
                backend: _version(backend),
                "numpy": np.__version__,
            },
            bound=bound,
        )


@dataclasses.dataclass(frozen=True)
class File:
    """A file that was read: "model", "data" or "labels", its name, SHA-256 in hex, arrays taken."""

    role: str
    name: str
    sha256: str
    arrays: tuple = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """What a certificate of the command line was made from.

    Attributes:
        files: Tuple of `File`.
        date: When, in ISO 8601, UTC.
        command: The command line.
    """

    files: tuple
    date: str
    command: str


def check_hash(certifiable, expected):
    """ValueError if the model has another hash than expected; None expects nothing."""
    if expected is None:
        return
    digest = certifiable.graph.digest()
    if digest == expected:
        return
    reason = ": these are other weights or another architecture."
    if (version := format_of(expected)) != HASH_FORMAT:
        reason = (
            f", which is of format {version}: this version computes format {HASH_FORMAT} alone. "
            "Whether these are other weights or another architecture only the version of "
            "keras_lipnext that wrote the old hash can tell; certify the model anew."
        )
    raise ValueError(f"The model's hash is {digest}, not the {expected} expected{reason}")


def format_of(weights_hash):
    """The version of a hash's format, which stands in front of it; the first had none."""
    version, colon, _ = weights_hash.partition(":")
    return int(version) if colon and version.isdecimal() else 1


def _version(package):
    from importlib.metadata import PackageNotFoundError, version

    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def policies(certifiable):
    """Names of the dtype policies of the model's layers, sorted."""
    layers = [s.operation for s in certifiable.steps if isinstance(s.operation, keras.layers.Layer)]
    return tuple(sorted({layer.dtype_policy.name for layer in layers}))


class Extremes:
    """Collects samples of smallest and largest radii, and the inputs' range, by batches.

    Attributes:
        not_finite: Number of samples whose input holds NaN or infinity. They have no part in the
            range: a comparison with NaN would hide that of all the others.
    """

    def __init__(self, count=8):
        self._count = count
        self._samples, self._offset = [], 0
        self._low, self._high = np.inf, -np.inf
        self.not_finite = 0

    def update(self, inputs, predictions, radii, labels):
        """Takes one batch."""
        order = np.argsort(radii.reshape(len(radii), -1).mean(axis=1), kind="stable")
        for k in {*order[: self._count], *order[-self._count :]}:
            # Built-in numbers of one decision, arrays of many.
            mine = [a if a is None else a[k].copy() for a in (predictions, labels, radii)]
            mine = [a.item() if np.ndim(a) == 0 and a is not None else a for a in mine]
            self._samples.append(Sample(self._offset + int(k), np.array(inputs[k]), *mine))
        self._samples.sort(key=lambda s: (np.mean(s.radius), s.index))
        del self._samples[self._count : -self._count]
        self._offset += len(inputs)
        finite = np.isfinite(inputs)
        self.not_finite += int((~finite.reshape(len(inputs), -1).all(axis=1)).sum())
        known = np.asarray(inputs)[finite]
        if known.size:
            self._low = min(self._low, float(known.min()))
            self._high = max(self._high, float(known.max()))

    @property
    def input_range(self):
        """(smallest, largest) finite entry of the inputs; None if there is none."""
        return (self._low, self._high) if self._low <= self._high else None

    def found(self):
        """Tuple of `Sample`, by increasing radius."""
        return tuple(self._samples)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample: its place in the data, its input, prediction, label (or None) and radius.

    The last three are arrays of a sample of many decisions, and its order that of mean radii.
    """

    index: int
    input: np.ndarray
    prediction: int | np.ndarray
    label: int | np.ndarray | None
    radius: float | np.ndarray
