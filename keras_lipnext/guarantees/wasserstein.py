"""A proven lower bound of the Wasserstein-1 distance of two samples, from a Lipschitz critic.

By Kantorovich and Rubinstein W1(P, Q) = sup E f(P) - E f(Q) over 1-Lipschitz f, so that any critic
f of constant K shows W1(P, Q) >= |E f(P) - E f(Q)| / K. [Villani, Optimal Transport, Remark 6.5]
"""

import dataclasses
import math
import sys
from typing import Any

import keras
import numpy as np

from keras_lipnext.arguments import number
from keras_lipnext.guarantees.enclose import enclose
from keras_lipnext.lipschitz.model import read
from keras_lipnext.report.certificate import evidence_dict, write_json
from keras_lipnext.report.provenance import Evidence
from keras_lipnext.typing import Path


@dataclasses.dataclass(frozen=True)
class WassersteinBound:
    """A lower bound of the Wasserstein-1 distance, l2 as the ground metric, of two samples.

    Attributes:
        lower_bound: Proven for the two empirical distributions: rounding is subtracted.
        difference: Mean of the critic on the first sample less that on the second.
        constant: The critic's Lipschitz constant, proven.
        samples: How many there are of each.
        evidence: `Evidence`: the critic's hash, its layers' constants, versions.
    """

    lower_bound: float
    difference: float
    constant: float
    samples: tuple[int, int]
    evidence: Evidence

    def of_distributions(self, diameter: float, delta: float = 0.05) -> float:
        """Lower bound for the distributions, true with probability 1 - delta at least.

        By Hoeffding's inequality, for independent samples that the critic was not trained on: on a
        set of this diameter K-Lipschitz functions vary by K diameter at most.

        Args:
            diameter: Of a set that holds both distributions, in units of the inputs.
            delta: Probability that the statement may fail.

        Raises:
            ValueError: if `diameter` is negative, not finite, or less than the lower bound, or
                `delta` not in (0, 1).
        """
        if not 0 <= number("diameter", diameter) < math.inf:
            raise ValueError(f"`diameter` must be finite and not negative. Received: {diameter!r}")
        if self.lower_bound > diameter:
            raise ValueError(
                f"The samples are further apart than a set of diameter {diameter!r} allows: their "
                f"distance is at least {self.lower_bound:.6g}"
            )
        if not 0 < number("delta", delta) < 1:
            raise ValueError(f"`delta` must be in (0, 1). Received: delta={delta!r}")
        # Both signs of the difference would have done: half of delta for each.
        inverse = sum(1 / n for n in self.samples)
        deviation = diameter * math.sqrt(inverse * math.log(2 / delta) / 2)
        return max(0.0, self.lower_bound - deviation * (1 + 2.0**-40))

    def to_dict(self) -> dict[str, Any]:
        """Everything in built-in types."""
        return {
            "lower_bound": self.lower_bound,
            "difference": self.difference,
            "constant": self.constant,
            "samples": list(self.samples),
            "evidence": evidence_dict(self.evidence),
        }

    def to_json(self, path: Path) -> None:
        """Writes `to_dict()` as JSON.

        Args:
            path: File name.
        """
        write_json(self.to_dict(), path)

    def __str__(self) -> str:
        declared = ", ".join(self.evidence.bound.declared)
        proof = f"declared, not proven, for {declared}" if declared else "proven"
        return (
            f"W1 of the two samples ({self.samples[0]} and {self.samples[1]}) is at least "
            f"{_down(self.lower_bound)}: the critic's means differ by {self.difference:.6g}, its "
            f"Lipschitz constant is {self.constant:.10g}, {proof}.\n"
            f"weights: sha256 {self.evidence.weights_hash}"
        )


def wasserstein(
    critic: keras.Model,
    p: Any,
    q: Any,
    batch_size: int = 256,
    expected_hash: str | None = None,
) -> WassersteinBound:
    """Proves a lower bound of the Wasserstein-1 distance of two samples.

    Example:

    ```python
    inputs = keras.Input((2,))
    critic = keras.Model(inputs, keras_lipnext.layers.OrthogonalDense(1)(inputs))
    p, q = np.zeros((8, 2)), np.ones((8, 2))
    bound = keras_lipnext.guarantees.wasserstein(critic, p, q)
    bound.lower_bound  # at most sqrt(2), the distance
    ```

    Args:
        critic: Model of one output, built of layers whose Lipschitz constant is known; trained with
            `keras_lipnext.losses.KantorovichRubinstein`, say. It need not be 1-Lipschitz.
        p, q: The samples: arrays or data sets, as `certify` takes them.
        batch_size, expected_hash: As for `certify`.

    Returns:
        `WassersteinBound`.

    Raises:
        ValueError: as for `enclose`; if the critic has several outputs, or an input or answer is
            not finite.
    """
    read(critic)  # refuses what has no outputs that can be known
    if tuple(critic.outputs[0].shape[1:]) != (1,):
        raise ValueError(
            "A critic has one output, shape (batch, 1). Received: "
            f"output_shape={tuple(critic.outputs[0].shape)}"
        )
    settings: dict[str, Any] = {"batch_size": batch_size, "verbose": 0, "arithmetic": "real"}
    first = enclose(critic, p, 0.0, expected_hash=expected_hash, **settings)
    second = enclose(critic, q, 0.0, expected_hash=first.evidence.weights_hash, **settings)
    if min(first.reach.min(), second.reach.min()) < 0:
        raise ValueError("The samples hold inputs that are not finite, or have no finite answer.")
    constant = float(max(first.constants[0], second.constants[0]))
    # A correctly rounded sum, a quotient, a difference.
    low = max(
        _mean(first.lower, -1) - _mean(second.upper, 1),
        _mean(second.lower, -1) - _mean(first.upper, 1),
    )
    low = math.nextafter(low, -math.inf)
    bound = 0.0
    if constant > 0 and low > 0:
        bound = min(low / constant, sys.float_info.max) * (1 - 2.0**-50)
    return WassersteinBound(
        lower_bound=bound,
        difference=float(np.mean(first.outputs) - np.mean(second.outputs)),
        constant=constant,
        samples=(len(first.outputs), len(second.outputs)),
        evidence=first.evidence,
    )


def _down(value):
    """Six digits, the last one rounded down."""
    text = f"{value:.6g}"
    return text if float(text) <= value else f"{value * (1 - 1e-5):.6g}"


def _mean(values, sign):
    """The mean, rounded down or up by its sign."""
    total = math.nextafter(math.fsum(values.ravel()), sign * math.inf)
    return math.nextafter(total / values.size, sign * math.inf)
