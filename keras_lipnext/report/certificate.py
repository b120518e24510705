"""The `Certificate`: what `certify` found, as numbers, text, figures, a page and JSON."""

import dataclasses
import json
import math
import pathlib
from typing import Any, ClassVar

import numpy as np

from keras_lipnext.report import page, plots, text
from keras_lipnext.report.provenance import Evidence, Source
from keras_lipnext.typing import Path


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Certified predictions of a model on data. `print` shows it as a table.

    Attributes:
        predictions: Integers, shape (n,); -1 where an input or a logit was not finite.
        radii: Float64, shape (n,): proven l2 radius of each prediction, in units of the inputs.
        labels: Integers, shape (n,), or None.
        epsilons: Tuple of floats, the radii reported.
        constant: Float, the Lipschitz constant of the whole model, from its input to its output.
        body_constant: Float, the Lipschitz constant K of the model's body, from its input to that
            of its head; the radii follow from it. `constant` if there is no head. Both are proven,
            but for the layers that `evidence.bound.declared` names.
        error_allowances: Float64, shape (n,), or None: what rounding can have done to the
            difference of logits that decides each radius, in units of the logits, in this
            evaluation and, at the sample, in a program of this `arithmetic`. It is subtracted.
        low_precision_differences: On how many samples the model's own prediction, computed in
            bfloat16 or float16, is another one. None for a model that computes in float32 or above.
        evidence: `Evidence`: the model's hash, its layers' constants, versions; or None.
        extremes: Tuple of `Sample`, those of smallest and largest radii, by increasing radius.
        input_range: (smallest, largest) finite entry of all inputs, or None.
        inputs_not_finite: Number of samples whose input holds NaN or infinity.
        source: `Source`, files, date and command, if the command line made it; or None.
        arithmetic: What the radii hold of: "real", the function in real arithmetic alone, as of
            every certificate that does not say; "float64" or "float32", that and every program
            that evaluates it in this type.
        low_precision_allowances: Float64, shape (n,), of a model that computes in bfloat16 or
            float16: what that may have done to the difference of logits that decides, by the same
            bounds. No radius allows for it. None for others.
    """

    unit: ClassVar[str] = "sample"  # of which there is a prediction and a radius each

    predictions: np.ndarray
    radii: np.ndarray
    labels: np.ndarray | None
    epsilons: tuple
    constant: float
    body_constant: float
    error_allowances: np.ndarray | None = None
    low_precision_differences: int | None = None
    evidence: Evidence | None = None
    extremes: tuple = ()
    input_range: tuple | None = None
    inputs_not_finite: int = 0
    source: Source | None = None
    arithmetic: str = "real"
    low_precision_allowances: np.ndarray | None = None

    @property
    def lipschitz_bound(self) -> float:
        """K of the radius formula, `body_constant`, by the name that version 0.1 files have."""
        return self.body_constant

    @property
    def correct(self) -> np.ndarray | None:
        """Whether each prediction is right; None without labels."""
        return None if self.labels is None else self.predictions == self.labels

    @property
    def unanswered(self) -> int:
        """Number of samples with prediction -1 and radius 0: an input or logit is not finite."""
        return int((self.predictions < 0).reshape(len(self.predictions), -1).any(axis=1).sum())

    def counted(self, values: np.ndarray) -> np.ndarray:
        """Those of values, one a decision, that count: all of them, of one decision a sample."""
        return values

    @property
    def clean_accuracy(self) -> float | None:
        """Share of samples classified correctly; None without labels."""
        return None if self.correct is None else float(self.counted(self.correct).mean())

    @property
    def certified_accuracy(self) -> dict[float, float] | None:
        """{epsilon: certified robust accuracy}; None without labels."""
        if self.correct is None:
            return None
        right, radii = self.counted(self.correct), self.counted(self.radii)
        return {e: float((right & (radii > e)).mean()) for e in self.epsilons}

    @property
    def certified_share(self) -> dict[float, float]:
        """{epsilon: share of predictions, right or wrong, with radius > epsilon}."""
        return {e: float((self.counted(self.radii) > e).mean()) for e in self.epsilons}

    @property
    def error_allowance(self) -> dict[str, float] | None:
        """{"median": E, "largest": E} over the samples, in units of the logits; None if unknown.

        Samples whose logits are not finite have none; their radius is 0.
        """
        if self.error_allowances is None:
            return None
        allowances = self.error_allowances[~np.isnan(self.error_allowances)]
        if not len(allowances):
            return {"median": math.nan, "largest": math.nan}
        return {"median": float(np.median(allowances)), "largest": float(allowances.max())}

    @property
    def per_class(self) -> list[dict[str, Any]]:
        """One dictionary a class that occurs: per true class, or per predicted one without labels.

        Keys: "class", "samples", "clean_accuracy" (None without labels), "certified_accuracy"
        (shares of the class by epsilon; of its predictions, right or wrong, without labels) and
        "median_radius". Class -1 holds predictions from inputs or logits that were not finite.
        """
        groups = self.counted(self.predictions if self.labels is None else self.labels)
        right = np.ones(self.radii.shape, bool) if self.correct is None else self.correct
        right = self.counted(right)
        rows = []
        for number in np.unique(groups):
            member = groups == number
            radii, correct = self.counted(self.radii)[member], right[member]
            rows.append(
                {
                    "class": int(number),
                    "samples": int(member.sum()),
                    "clean_accuracy": None if self.labels is None else float(correct.mean()),
                    "certified_accuracy": {
                        e: float((correct & (radii > e)).mean()) for e in self.epsilons
                    },
                    "median_radius": float(np.median(radii)),
                }
            )
        return rows

    def headlines(self) -> list[tuple[str, str]]:
        """(quantity, value) pairs of the accuracies, as `print` shows them."""
        return text.headlines(self)

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """Everything in built-in types; the arrays with `samples`. Floats can be infinite or NaN.

        Args:
            samples: Whether to add, as "per_sample", lists of predictions, radii and labels.
        """
        arrays = {"predictions": self.predictions, "radii": self.radii, "labels": self.labels}
        lists = {name: None if a is None else a.tolist() for name, a in arrays.items()}
        return {
            "samples": len(self.radii),
            "unanswered": self.unanswered,
            "inputs_not_finite": self.inputs_not_finite,
            "clean_accuracy": self.clean_accuracy,
            "certified_accuracy": self.certified_accuracy,
            "certified_share": self.certified_share,
            "mean_radius": float(self.counted(self.radii).mean()),
            "median_radius": float(np.median(self.counted(self.radii))),
            "lipschitz_bound": float(self.lipschitz_bound),
            "constant": float(self.constant),
            "body_constant": float(self.body_constant),
            "error_allowance": self.error_allowance,
            "low_precision_differences": self.low_precision_differences,
            "low_precision_allowance": None
            if self.low_precision_allowances is None
            else float(np.median(self.low_precision_allowances)),
            "arithmetic": self.arithmetic,
            "per_class": self.per_class,
            "input_range": None if self.input_range is None else list(self.input_range),
            "evidence": None if self.evidence is None else evidence_dict(self.evidence),
            "source": None if self.source is None else dataclasses.asdict(self.source),
            "promise": list(text.promise(self)),
            **({"per_sample": lists} if samples else {}),
        }

    def to_json(self, path: Path, samples: bool = False) -> None:
        """Writes `to_dict(samples)` as JSON.

        JSON has no infinity and no NaN: they become the strings "inf", "-inf" and "nan". Keys are
        strings, epsilons too.

        Args:
            path: File name.
            samples: As for `to_dict`.
        """
        write_json(self.to_dict(samples), path)

    def __str__(self) -> str:
        return text.plain(self)

    def to_markdown(self) -> str:
        """The certificate in Markdown: the table, per class, what it rests on and promises."""
        return text.markdown(self)

    def to_html(self, path: Path) -> None:
        """Writes the certificate as one HTML file that needs no other file and no script.

        With the curve of certified accuracy, the radii, each class, the samples of smallest and
        largest radii (as pictures, if the inputs are images of 1 or 3 channels), what is promised,
        and each layer's constant.

        Args:
            path: File name.

        Raises:
            ImportError: if jinja2 or matplotlib is not installed.
        """
        pathlib.Path(path).write_text(page.html(self), encoding="utf-8")

    def plot(self, path: Path) -> None:
        """Writes the curve of certified robust accuracy against epsilon as an image.

        Args:
            path: File name; its extension chooses the format (.png, .pdf, .svg).

        Raises:
            ImportError: if matplotlib is not installed.
        """
        plots.save(plots.accuracy_curve(self), path)

    def plot_radii(self, path: Path) -> None:
        """Writes a histogram of the radii, right and wrong predictions apart, as an image.

        Args:
            path: File name; its extension chooses the format (.png, .pdf, .svg).

        Raises:
            ImportError: if matplotlib is not installed.
        """
        plots.save(plots.radius_histogram(self), path)


def evidence_dict(evidence):
    """`Evidence` in built-in types."""
    bound = evidence.bound
    return {
        "model": evidence.model,
        "parameters": int(evidence.parameters),
        "weights_hash": evidence.weights_hash,
        "dtypes": list(evidence.dtypes),
        "input_shape": list(evidence.input_shape),
        "backend": evidence.backend,
        "versions": dict(evidence.versions),
        "lipschitz_method": bound.method.name if bound.method else "product",
        "how_proven": text.how_proven(bound),
        "layers": [
            {
                "name": layer.name,
                "class": layer.kind,
                "constant": float(layer.constant),
                "total": float(layer.total),
                "proven": layer.proven,
                "reads": list(layer.reads),
                "bounded_together_with": layer.joined or None,
            }
            for layer in bound.layers
        ],
        "head": bound.head,
        "notes": list(bound.notes),
    }


def write_json(value, path):
    """Writes nested built-in or NumPy values as standard JSON."""
    written = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    pathlib.Path(path).write_text(written + "\n", encoding="utf-8")


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
