"""Certificates of many decisions a sample: at each position of an image, or of each label."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from keras_lipnext.report import plots, text
from keras_lipnext.report.certificate import Certificate
from keras_lipnext.typing import Path


@dataclasses.dataclass(frozen=True)
class _ManyDecisions(Certificate):
    """What the kinds share: all that `Certificate` says, of decisions in place of samples."""

    def to_html(self, path: Path) -> None:
        """Not there: the page speaks of one decision a sample."""
        raise ValueError(
            f"A {type(self).__name__} has no HTML page: write `to_markdown()`, `to_json(path)` and "
            f"`plot(path)`. Received: path={str(path)!r}"
        )


@dataclasses.dataclass(frozen=True)
class DenseCertificate(_ManyDecisions):
    """Certified predictions at each position: the pixels of images, the steps of sequences.

    Everything that `Certificate` has, with `predictions`, `radii` and `labels` of shape (n, height,
    width), or (n, ...); accuracies are shares of positions, over all samples. A radius is the l2
    norm of one perturbation of the whole input, and all positions of larger radii keep their
    predictions under it at the same time.

    The mean intersection over union (IoU) is taken over the whole data set, and averaged over the
    classes that occur among the labels. `certified_mean_iou` is below that of the predictions for
    any perturbations of the inputs, one each, of norms up to epsilon.

    Attributes:
        ignore_class: Label of positions that count nowhere, or None.
    """

    unit: ClassVar[str] = "position"

    ignore_class: int | None = None

    def counted(self, values: np.ndarray) -> np.ndarray:
        """Those of values, one a position, whose label is not `ignore_class`."""
        if self.labels is None or self.ignore_class is None:
            return values.reshape(-1)
        return values[self.labels != self.ignore_class]

    @property
    def mean_iou(self) -> float | None:
        """Mean IoU of the predictions; None without labels."""
        return None if self.labels is None else self._iou(np.ones(self.radii.shape, bool))

    @property
    def certified_mean_iou(self) -> dict[float, float] | None:
        """{epsilon: proven lower bound of the mean IoU}; None without labels."""
        if self.labels is None:
            return None
        return {e: self._iou(self.radii > e) for e in self.epsilons}

    def _iou(self, kept):
        values = (self.counted(v) for v in (self.predictions, self.labels, kept))
        return least_mean_iou(*values)

    def headlines(self) -> list[tuple[str, str]]:
        """(quantity, value) pairs of the accuracies and IoUs, as `print` shows them."""
        pairs = text.headlines(self, "clean accuracy of positions", "of positions, certified")
        if self.labels is None:
            return pairs
        clean = ("mean IoU", f"{self.mean_iou:.2%}")
        return [*pairs, clean, *text.at_epsilons("mean IoU, certified", self.certified_mean_iou)]

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """As `Certificate.to_dict`, with the mean IoU."""
        own = {"mean_iou": self.mean_iou, "certified_mean_iou": self.certified_mean_iou}
        return {**super().to_dict(samples), "positions": list(self.radii.shape[1:]), **own}

    def plot_maps(self, path: Path, epsilon: float | None = None) -> None:
        """Draws samples of `extremes` side by side: input, labels, prediction, radii, certified.

        Args:
            path: File name; its extension chooses the format (.png, .pdf, .svg).
            epsilon: Radius from which a position is drawn as certified, the first of `epsilons` by
                default.

        Raises:
            ValueError: if positions are not those of images, or no samples were kept.
            ImportError: if matplotlib is not installed.
        """
        epsilon = self.epsilons[0] if epsilon is None else epsilon
        plots.save(plots.maps(self, epsilon), path)


@dataclasses.dataclass(frozen=True)
class LabelsCertificate(_ManyDecisions):
    """Certified predictions of independent labels, each of which is there or not.

    Everything that `Certificate` has, with `predictions`, `radii` and `labels` of shape (n,
    labels): 0 or 1, -1 where an input or logit was not finite. Accuracies are shares of all labels;
    `per_class` takes absent and present ones apart.
    """

    unit: ClassVar[str] = "label"

    def counted(self, values: np.ndarray) -> np.ndarray:
        """The values of all labels of all samples."""
        return values.reshape(-1)

    @property
    def per_label(self) -> list[dict[str, Any]]:
        """One dictionary a label: "label", "clean_accuracy", "certified_accuracy" by epsilon.

        Without labels to compare with, accuracies are None and shares of certified predictions.
        """
        labels = range(self.radii.shape[-1])
        right = np.ones(self.radii.shape, bool) if self.correct is None else self.correct
        return [
            {
                "label": k,
                "clean_accuracy": None if self.labels is None else float(right[..., k].mean()),
                "certified_accuracy": self._certified(right[..., k], self.radii[..., k]),
                "median_radius": float(np.median(self.radii[..., k])),
            }
            for k in labels
        ]

    @property
    def set_accuracy(self) -> float | None:
        """Share of samples of which all labels are right; None without labels."""
        return None if self.correct is None else float(self.correct.all(axis=-1).mean())

    @property
    def certified_set_accuracy(self) -> dict[float, float] | None:
        """{epsilon: share of samples of which all labels are right and certified}, or None."""
        if self.correct is None:
            return None
        return self._certified(self.correct.all(axis=-1), self.radii.min(axis=-1))

    def _certified(self, right, radii):
        return {e: float((right & (radii > e)).mean()) for e in self.epsilons}

    def headlines(self) -> list[tuple[str, str]]:
        """(quantity, value) pairs of the accuracies, as `print` shows them."""
        pairs = text.headlines(self, "clean accuracy of labels", "of labels, certified")
        if self.labels is None:
            return pairs
        whole = ("all labels of a sample right", f"{self.set_accuracy:.2%}")
        certified = text.at_epsilons("all labels, certified", self.certified_set_accuracy)
        return [*pairs, whole, *certified]

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """As `Certificate.to_dict`, with each label and the sets of labels."""
        own = {
            "per_label": self.per_label,
            "set_accuracy": self.set_accuracy,
            "certified_set_accuracy": self.certified_set_accuracy,
        }
        return {**super().to_dict(samples), **own}


def least_mean_iou(predictions, labels, kept):
    """The smallest mean IoU, over the classes among the labels, that predictions can come to.

    Those `kept` stay; any other may become any class. It is at its worst where it is wrong: class c
    then has t_c right predictions and a union of s_c + b_c positions, where s_c counts its labels
    and the kept predictions beside them, and b_c others that have come to it. These are not of its
    own labels, b_c <= m_c, and no more than there are, sum b_c <= m. For any price p >= 0 of one

        sum_c t_c / (s_c + b_c)  >=  sum_c min_{0 <= b <= m_c} (t_c / (s_c + b) + p b)  -  p m

    (weak duality), whose minimum is at b = sqrt(t_c / p) - s_c. That of the best p is the answer.
    """
    classes, counts = np.unique(labels, return_counts=True)
    right = kept & (predictions == labels)
    t = np.array([(right & (labels == c)).sum() for c in classes], "float64")
    s = counts + np.array([(kept & (predictions == c) & (labels != c)).sum() for c in classes])
    m = float((~kept).sum())
    most = m - np.array([(~kept & (labels == c)).sum() for c in classes])

    def bound(price):
        b = np.clip(np.sqrt(t / price) - s, 0.0, most) if price > 0 else most
        return (t / (s + b) + price * b).sum() - price * m, b.sum()

    low, high = 0.0, 1.0
    values = [bound(low)[0], bound(high)[0]]
    for _ in range(64 if m else 0):
        middle = (low + high) / 2
        value, taken = bound(middle)
        values.append(value)
        low, high = (middle, high) if taken > m else (low, middle)
    # A sum of shares at most 1 each, and their cancelling prices: 2^-40 is far above the rounding.
    found = max(values) / len(classes)
    return float(found if not m else max(found - 2.0**-40 * (1 + m), 0.0))
