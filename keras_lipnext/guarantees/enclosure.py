"""The `Enclosure`: what `enclose` found of a model's outputs."""

import dataclasses
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_lipnext.norms.roundoff import UNIT_ROUNDOFF
from keras_lipnext.report.certificate import evidence_dict, write_json
from keras_lipnext.report.provenance import Evidence
from keras_lipnext.typing import Path


@dataclasses.dataclass(frozen=True)
class Enclosure:
    """Intervals that contain a model's outputs under perturbations. `print` shows a summary.

    Attributes:
        outputs: Float64, shape (n, ...): the outputs at the inputs as they are.
        lower, upper: Float64, shape (n, ...): every output for a perturbation of l2 norm up to
            epsilon lies between them. Infinite where an input or output is not finite.
        epsilon: Float64, shape (n,), in units of the inputs.
        constants: Float64, shape (outputs,), of the last axis: by how much an output changes per
            unit of distance, at most, rounding of programs included.
        allowances: Float64, shape (n, ...): what rounding may have done to each output.
        reach: Float64, shape (n, ...): the radius up to which that holds; infinite but where a
            program might overflow, and -1 where nothing holds.
        evidence: `Evidence`: the model's hash, its layers' constants, versions.
        arithmetic: What the intervals hold of, as for `certify`.
    """

    outputs: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    epsilon: np.ndarray
    constants: np.ndarray
    allowances: np.ndarray
    reach: np.ndarray
    evidence: Evidence
    arithmetic: str

    @property
    def width(self) -> np.ndarray:
        """upper - lower, shape (n, ...)."""
        return self.upper - self.lower

    def radius(self, lower: npt.ArrayLike = -np.inf, upper: npt.ArrayLike = np.inf) -> np.ndarray:
        """Radius up to which each output provably stays within limits, rounded down.

        Args:
            lower, upper: Limits, of a shape that broadcasts against the outputs'.

        Returns:
            Float64, shape (n, ...); 0 where an output is not within the limits, or so close that
            rounding may have put it there. The smallest over the last axis is a sample's.

        Raises:
            ValueError: if a limit is NaN or a lower one above its upper one.
        """
        low, high = np.asarray(lower, "float64"), np.asarray(upper, "float64")
        if not (low <= high).all():
            raise ValueError(
                "Limits are numbers, the lower ones not above the upper ones. Received: "
                f"lower={lower!r}, upper={upper!r}"
            )
        with np.errstate(all="ignore"):
            room = np.minimum(_room(high, self.outputs), _room(self.outputs, low))
            room = _below(room - self.allowances)
            found = np.where(self.constants > 0, room / self.constants, np.inf)
            # A quotient that overflows is above 2^1000, not infinite.
            capped = np.isfinite(room) & (self.constants > 0)
            found = np.where(capped, np.minimum(found, 2.0**1000), found)
            found = np.minimum(found * (1 - 8 * UNIT_ROUNDOFF), self.reach)
        return np.where((room >= 0) & (found > 0), found, 0.0)

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """Everything in built-in types; the arrays with `samples`.

        Args:
            samples: Whether to add, as "per_sample", outputs, intervals and epsilons.
        """
        names = ("outputs", "lower", "upper", "epsilon")
        lists = {name: getattr(self, name).tolist() for name in names}
        return {
            "samples": len(self.outputs),
            "without_an_answer": int((self.reach < 0).sum()),
            "largest_epsilon": float(self.epsilon.max()),
            "median_width": float(np.median(self.width)),
            "constants": self.constants.tolist(),
            "arithmetic": self.arithmetic,
            "evidence": evidence_dict(self.evidence),
            **({"per_sample": lists} if samples else {}),
        }

    def to_json(self, path: Path, samples: bool = False) -> None:
        """Writes `to_dict(samples)` as JSON; infinite numbers become strings.

        Args:
            path: File name.
            samples: As for `to_dict`.
        """
        write_json(self.to_dict(samples), path)

    def __str__(self) -> str:
        declared = ", ".join(self.evidence.bound.declared)
        proof = f"declared, not proven, for {declared}" if declared else "proven from the weights"
        what = "the function" if self.arithmetic == "real" else f"{self.arithmetic} programs, too"
        known = self.reach >= 0
        rows = {
            "samples": len(self.outputs),
            "outputs of a sample": "x".join(map(str, self.outputs.shape[1:])),
            "values without an interval": int((self.reach < 0).sum()),
            "largest epsilon": f"{self.epsilon.max():.4g}",
            "median width of the intervals": f"{np.median(self.width):.4g}",
            "largest constant of an output": f"{self.constants.max():#.10g}",
            "largest rounding allowance": f"{self.allowances.max(initial=0.0, where=known):.2g}",
        }
        lines = [f"{name:<30}  {value:>14}" for name, value in rows.items()]
        return "\n".join(
            [
                *lines,
                f"constants: {proof}",
                f"weights: sha256 {self.evidence.weights_hash}",
                f"Promised of {what}: every output for a perturbation of l2 norm up to epsilon "
                "lies in its interval.",
            ]
        )


def _room(larger, smaller):
    """larger - smaller, rounded down; infinite only where one of them is."""
    infinite = np.isinf(larger) | np.isinf(smaller)
    difference = larger - smaller
    return np.where(infinite, difference, _below(np.minimum(difference, sys.float_info.max)))


def _below(value):
    """The float64 below a result that was rounded to nearest; infinity stays."""
    return np.where(np.isinf(value), value, np.nextafter(value, -np.inf))
