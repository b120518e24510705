"""Random networks of long sums whose terms vanish where a sum starts with what joins it.

Terms are just under half a unit of 1, what they are added to are ones: a sum that starts with a 1
loses all of its terms. How a backend's compiler orders what it fused is seen of a single
sample; each network is evaluated once, and its allowance worked out as often as one likes.
"""

import dataclasses

import extended
import keras
import numpy as np
from data import to_numpy
from test_layer_rules import norms, program_arithmetic, whole

from keras_lipnext.lipschitz.model import measured
from keras_lipnext.lipschitz.rounding import forward_errors, input_norms
from keras_lipnext.twin import Float64Twin

kl, ops = keras.layers, keras.ops

UNITS = {"float64": 2.0**-53, "float32": 2.0**-24}
LENGTHS, WIDTHS = (16, 40, 100, 256, 700, 1500), (1, 2, 3, 4, 8)


@dataclasses.dataclass
class Sums:
    """A network of sums, a sample, and what was lost of it.

    Attributes:
        certifiable: The network, without a head.
        arithmetic: "float64", `certify`'s own evaluation, or "float32", the network's program.
        x: The sample.
        exact: {index of a value: it in 80 bits}.
        lost: The error of the backend's answer, a norm.
        units: The error in units of the largest output.
    """

    certifiable: object
    arithmetic: str
    x: np.ndarray
    exact: dict
    lost: float
    units: float

    def share(self):
        """What was lost, of what the rules allow for: at most 1."""
        graph = self.certifiable.graph
        shapes = {i: value.shape for i, value in self.exact.items()}
        given = {}
        if self.arithmetic == "float32":
            given = {"arithmetic": program_arithmetic("float32", self.certifiable)}
        bounds, _ = measured(graph, shapes, **given)
        _, allowed = forward_errors(graph, bounds, input_norms(self.x))[graph.output]
        return self.lost / float(allowed[0])


def build(seed, unit):
    """(model, sample), of one to four operations that merge ones and sums."""
    small = np.float32(np.sqrt(0.999 * unit))  # its square is a term
    rng = np.random.default_rng(seed)
    terms, width = int(rng.choice(LENGTHS)), int(rng.choice(WIDTHS))
    inputs = keras.Input((width + terms,))
    kernel = np.zeros((width + terms, width), "float32")
    kernel[width:] = small
    ones = [np.ones(width, "float32")]

    def dense(use_bias=False):
        layer = kl.Dense(width, use_bias=use_bias)
        outputs = layer(inputs)
        layer.set_weights([kernel] + ones * use_bias)
        return outputs

    def convolution():
        layer = kl.Conv1D(width, width + terms)
        outputs = layer(ops.reshape(inputs, (-1, width + terms, 1)))
        layer.set_weights([kernel[:, None], *ones])
        return ops.reshape(outputs, (-1, width))

    def normalized(use_bias=False):
        layer = kl.BatchNormalization(epsilon=2.0**-10)
        outputs = layer(dense(use_bias))
        layer.set_weights([np.full(width, value) for value in (1, 1, 0, 1 - layer.epsilon)])
        return outputs

    values = [inputs[:, :width], dense(True), dense()]

    def some(fewest=2, most=5):
        return [values[i] for i in rng.integers(len(values), size=rng.integers(fewest, most + 1))]

    def one():
        return some(1, 1)[0]

    merges = (
        lambda: kl.Add()(some()),
        lambda: kl.Average()(some()),
        lambda: kl.Subtract()(some(2, 2)),
        lambda: kl.Add()([dense() for _ in range(rng.integers(2, 7))] + some(1, 1)),
        lambda: kl.Subtract()([one(), normalized(True)]),
        lambda: kl.GlobalAveragePooling1D()(ops.stack(some(), axis=1)),
        lambda: ops.sum(ops.stack(some(), axis=1), axis=1),
        lambda: ops.mean(ops.stack(some(), axis=1), axis=1),
        lambda: one() + ops.sum(ops.expand_dims(one(), 1), axis=1),
        lambda: dense(bool(rng.integers(2))) + one(),
        lambda: ops.flip(one(), axis=1) + dense(),
        lambda: one() * 0.5 + dense(True),
        lambda: ops.squeeze(ops.expand_dims(dense(True), 2), 2) + one(),
        lambda: ops.maximum(*some(2, 2)),
        lambda: ops.relu(one()),
        lambda: kl.Dense(width)(ops.concatenate(some(2, 2), axis=1)),
        normalized,
        convolution,
    )
    for _ in range(rng.integers(1, 5)):
        values.append(merges[rng.integers(len(merges))]())
    sample = np.full((1, width + terms), small, "float64")
    sample[:, :width] = 1
    return keras.Model(inputs, values[-1]), sample


def evaluated(seed, arithmetic="float64"):
    """`Sums`, or None where the certificate refuses what was drawn: sums of sums."""
    unit = UNITS[arithmetic]
    model, x = build(seed, unit)
    certifiable = whole(model)
    exact = {0: x.astype(extended.LONG), **extended.evaluate(certifiable, x)}
    output = exact[certifiable.graph.output]
    found = Sums(certifiable, arithmetic, x, exact, 0.0, 0.0)
    try:
        found.share()
    except ValueError as refused:
        assert "add up over all axes at once" in str(refused)
        return None
    if arithmetic == "float64":
        answer = Float64Twin(certifiable)(x)
    else:
        answer = to_numpy(model.predict_on_batch(x.astype("float32")))
    lost = answer.astype(extended.LONG) - output
    units = np.abs(lost).max() / (unit * max(1, np.abs(output).max()))
    return dataclasses.replace(found, lost=float(norms(lost)[0]), units=float(units))
