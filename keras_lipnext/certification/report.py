"""The `Certificate`: what `certify` found, as numbers, a table and a plot."""

import dataclasses

import numpy as np

PROMISE = (
    "Promised: the function the stored weights define keeps its prediction for every l2 "
    "perturbation of the input below the sample's radius. K is an upper bound proven from the "
    "weights; logits were evaluated in float64.",
    "Not promised: execution in float32 or below, the rounding of the float64 evaluation itself "
    "(not subtracted), preprocessing outside the model, or that a label is right.",
)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Certified predictions of a model on data.

    Attributes:
        predictions: Integers, shape (n,); -1 where a logit was not finite.
        radii: Float64, shape (n,): proven l2 radius of each prediction, in units of the inputs.
        labels: Integers, shape (n,), or None.
        epsilons: Tuple of floats, the radii reported.
        lipschitz_bound: Float, the proven Lipschitz constant K of the model's body.
    """

    predictions: np.ndarray
    radii: np.ndarray
    labels: np.ndarray | None
    epsilons: tuple
    lipschitz_bound: float

    @property
    def correct(self):
        """Whether each prediction is right; None without labels."""
        return None if self.labels is None else self.predictions == self.labels

    @property
    def clean_accuracy(self):
        """Share of samples classified correctly; None without labels."""
        return None if self.labels is None else float(self.correct.mean())

    @property
    def certified_accuracy(self):
        """{epsilon: certified robust accuracy}; None without labels."""
        if self.labels is None:
            return None
        return {e: float((self.correct & (self.radii > e)).mean()) for e in self.epsilons}

    @property
    def certified_share(self):
        """{epsilon: share of predictions, right or wrong, with radius > epsilon}."""
        return {e: float((self.radii > e).mean()) for e in self.epsilons}

    def to_dict(self):
        """Summary of built-in types, for JSON."""
        return {
            "samples": len(self.radii),
            "clean_accuracy": self.clean_accuracy,
            "certified_accuracy": self.certified_accuracy,
            "certified_share": self.certified_share,
            "mean_radius": float(self.radii.mean()),
            "median_radius": float(np.median(self.radii)),
            "lipschitz_bound": self.lipschitz_bound,
            "promise": list(PROMISE),
        }

    def _rows(self):
        """(quantity, value) pairs."""
        rows = [("samples", str(len(self.radii)))]
        if self.labels is not None:
            rows.append(("clean accuracy", f"{self.clean_accuracy:.2%}"))
            accuracy, name = self.certified_accuracy, "certified robust accuracy"
        else:
            accuracy, name = self.certified_share, "share of predictions certified"
        rows += [(f"{name} at epsilon = {e:.4g}", f"{accuracy[e]:.2%}") for e in self.epsilons]
        rows.append(("median radius", f"{np.median(self.radii):.4g}"))
        rows.append(("Lipschitz constant K, proven", f"{self.lipschitz_bound:.9f}"))
        return rows

    def __str__(self):
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        table = [f"{name:<{width}}  {value:>12}" for name, value in rows]
        return "\n".join([*table, *PROMISE])

    def to_markdown(self):
        """The table in Markdown."""
        rows = ["| quantity | value |", "| --- | ---: |"]
        rows += [f"| {name} | {value} |" for name, value in self._rows()]
        return "\n".join([*rows, "", *(f"{sentence}\n" for sentence in PROMISE)])

    def plot(self, path):
        """Writes the curve of certified robust accuracy against epsilon as an image.

        Args:
            path: File name; its extension chooses the format (.png, .pdf, .svg).

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "`plot` needs matplotlib: pip install 'keras_lipnext[plot]'"
            ) from error
        counted = self.radii if self.labels is None else self.radii[self.correct]
        label = "predictions certified" if self.labels is None else "certified robust accuracy"
        finite = counted[np.isfinite(counted)]
        limit = max([*finite, *self.epsilons, 1e-12]) * 1.02
        # A step down at each radius: exactly the share of samples with radius > epsilon.
        edges = np.concatenate([[0.0], np.sort(finite), [limit]])
        counts = np.array([(counted > e).sum() for e in edges]) / len(self.radii)
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.step(edges, 100 * counts, where="post", color="black", label=label)
        if self.labels is not None:
            clean = 100 * self.clean_accuracy
            axes.axhline(clean, color="0.5", linestyle="--", label=f"clean accuracy {clean:.1f} %")
        shares = self.certified_accuracy or self.certified_share
        for epsilon in self.epsilons:
            share = 100 * shares[epsilon]
            axes.plot(epsilon, share, "o", color="black")
            axes.annotate(
                f"{share:.1f} %", (epsilon, share), xytext=(6, 4), textcoords="offset points"
            )
        axes.set(
            xlabel="epsilon: l2 norm of the perturbation, in units of the inputs",
            ylabel=f"{label} (%)",
            xlim=(0, limit),
            ylim=(0, 104),
        )
        axes.grid(color="0.9")
        axes.legend(loc="lower left")
        figure.savefig(path, dpi=150)
