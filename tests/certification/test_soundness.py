"""What a certificate must survive, and the gate: faults that these detectors must catch."""

import contextlib
import dataclasses

import detectors
import extended
import keras
import numpy as np
import pytest
import red_team
from data import to_numpy

import keras_lipnext as lip
from keras_lipnext import radius, twin
from keras_lipnext.backend import programs
from keras_lipnext.certification import decisions, evaluation
from keras_lipnext.layers import images, shift_mixing, spatial_shift
from keras_lipnext.lipschitz import model as lipschitz
from keras_lipnext.lipschitz import program, rounding
from keras_lipnext.lipschitz.rules import base as rules
from keras_lipnext.lipschitz.rules import layers as layer_rules
from keras_lipnext.lipschitz.rules import merging as merging_rules
from keras_lipnext.lipschitz.rules import operations as operation_rules
from keras_lipnext.lipschitz.rules import pooling as pooling_rules
from keras_lipnext.lipschitz.rules import sdp as sdp_rules
from keras_lipnext.lmi import _secants as secants
from keras_lipnext.lmi import local
from keras_lipnext.norms.roundoff import PROGRAMS, Arithmetic

pytestmark = pytest.mark.skipif(not extended.HAS_LONG, reason="longdouble is float64 here")


@pytest.mark.parametrize("detector", detectors.ALL, ids=lambda d: d.__name__)
def test_detector_finds_nothing(detector):
    detector()


# The gate. A mutant replaces attributes of modules or classes: [(owner, name, replacement)].


def assumed_norms():
    """K = 1 by construction, the stored weights not looked at."""
    return [(rules, "spectral_norm_bound", lambda matrix: 1.0)]


def power_iteration():
    """Ten steps of power iteration: a lower bound of the norm taken for an upper one."""

    def norm(matrix):
        v = np.random.default_rng(0).normal(size=matrix.shape[1])
        for _ in range(10):
            v = matrix.T @ (matrix @ v)
            v /= np.linalg.norm(v)
        return float(np.linalg.norm(matrix @ v))

    return [(rules, "spectral_norm_bound", norm)]


def clamped_border():
    """Shifts that replicate the border instead of padding with zeros."""

    def slide(x, axis, step):
        take = np.clip(np.arange(x.shape[axis]) - step, 0, x.shape[axis] - 1)
        return keras.ops.take(x, take, axis=axis)

    return [(spatial_shift, "_slide", slide)]


def duplicated_slices():
    """Shifts of series and volumes in which the border comes twice, and what left is lost."""
    roll = spatial_shift._roll

    def duplicating(x, axis, step):
        if len(x.shape) == 4:
            return roll(x, axis, step)
        take = np.clip(np.arange(x.shape[axis]) - step, 0, x.shape[axis] - 1)
        return keras.ops.take(x, take, axis=axis)

    return [(spatial_shift, "_roll", duplicating)]


def pooled_over_two_axes():
    """L2 pooling of a volume that adds the norms of its slices, counted as 1."""

    def call(self, inputs):
        axes = images.spatial_axes(self.data_format, len(inputs.shape))
        energy = keras.ops.sum(keras.ops.square(inputs), axis=axes[:2], keepdims=True)
        return keras.ops.sum(keras.ops.sqrt(energy + self.epsilon), axis=axes)

    return [(lip.layers.L2Pool, "call", call)]


def mixing(formula):
    """ShiftMixing with another formula of (inputs, rows, moved, kernel)."""

    def call(self, inputs):
        kernel = keras.ops.convert_to_tensor(self.kernel)
        rows = keras.ops.matmul(inputs, kernel)
        moved = rows + spatial_shift.shift_changes(rows, self.padding, self.data_format)
        return formula(inputs, rows, moved, kernel)

    return [(shift_mixing.ShiftMixing, "call", call)]


def back(x, kernel):
    return keras.ops.matmul(x, keras.ops.transpose(kernel))


def wrong_transpose():
    """R^T read in another order on the way back."""
    return mixing(lambda x, rows, moved, k: x + back(moved - rows, keras.ops.flip(k, axis=0)))


def shift_without_identity():
    """S where S - I belongs."""
    return mixing(lambda x, rows, moved, k: x + back(moved, k))


def distances(function):
    return [(decisions, "pairwise_distances_float64", function)]


def head_taken_as_normalised():
    """Distances of the normalised weight vectors, whatever is stored."""
    return distances(
        lambda kernel: radius.pairwise_distances_float64(kernel / np.linalg.norm(kernel, axis=0))
    )


def sqrt_2_rule():
    """sqrt(2) max ||w|| for every pair."""
    return distances(
        lambda kernel: np.full(
            (kernel.shape[1],) * 2, 2**0.5 * np.linalg.norm(kernel, axis=0).max()
        )
    )


def radii(change):
    """certified_radii_float64 with a fault."""
    real = radius.certified_radii_float64
    return [(evaluation, "certified_radii_float64", lambda *a: change(real, *a))]


def largest_over_classes():
    """max over j where min belongs."""

    def change(real, logits, distances, allowances):
        predictions, _, deciding = real(logits, distances, allowances)
        rows = np.arange(len(logits))
        margins = logits[rows, predictions][:, None] - logits - allowances
        needed = distances[predictions]
        ratios = np.where(needed > 0, margins / np.where(needed > 0, needed, 1), 0)
        return predictions, np.maximum(ratios.max(axis=1), 0), deciding

    return radii(change)


def certified_ties():
    """Every logit equal to the largest is masked, as if it were the same class."""

    def change(real, logits, distances, allowances):
        predictions, found, deciding = real(logits, distances, allowances)
        top = logits.max(axis=1, keepdims=True)
        ratios = np.where(logits < top, (top - logits) / distances.max(), np.inf).min(axis=1)
        return predictions, np.where(found == 0, ratios, found), deciding

    return radii(change)


def no_allowance():
    """The rounding of the float64 evaluation is not subtracted."""
    return radii(lambda real, logits, distances, allowances: real(logits, distances))


def float32_evaluation():
    """Logits of float32 arithmetic, with allowances of float64."""
    real = twin.Float64Twin.__call__

    def call(self, x):
        return real(self, x).astype("float32").astype("float64")

    return [(twin.Float64Twin, "__call__", call)]


def biases_without_rounding():
    """Large biases that do not enter the allowance."""
    return [
        (layer_rules, "added", lambda context, values, terms=None: rules.Bound(1.0)),
    ]


def rule(cls, function):
    """Another rule for a layer class, passed off as a proof."""
    return [(rules._LAYERS, cls, dataclasses.replace(rules._LAYERS[cls], function=function))]


def overlap_forgotten():
    """Max-pooling counted as 1-Lipschitz although its windows overlap."""
    return [(pooling_rules, "_overlap", lambda layer: 1)]


def sums_as_one_tensor():
    """Residual branches combined like the parts of one vector."""
    return rule(keras.layers.Add, lambda layer, context: rules.Bound(1.0, relative=1e-15))


def largest_deviation():
    """Normalisation divided by the largest standard deviation."""

    def normalization(layer, context):
        scale = 1 / np.sqrt(to_numpy(layer.variance))
        return rules.Bound(float(scale.min()), offset=100.0, relative=1e-14, absolute=1e-13)

    return rule(keras.layers.Normalization, normalization)


def average_overlap_forgotten():
    """Average pooling counted as if its windows were apart."""

    def average(layer, context):
        return rules.Bound(1 / np.sqrt(np.prod(layer.pool_size)), relative=1e-14)

    return rule(keras.layers.AveragePooling2D, average)


def reshaped_kernel():
    """A convolution's norm taken to be that of its kernel as a matrix."""

    def norm(kernel, *settings):
        return float(np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2))

    return [(rules, "convolution_norm_bound", norm)]


def stem_forgotten():
    """The first layer's constant left out of the product."""
    real = lipschitz.step_bounds

    def bounds(step, context):
        if step.inputs == (0,):
            return (rules.Bound(1.0, offset=1e3, relative=1e-13, absolute=1e-10),)
        return real(step, context)

    return [(lipschitz, "step_bounds", bounds)]


def one_sided_mixing_constant():
    """ShiftMixing counted as an isometry whatever its kernel."""
    return rule(lip.layers.ShiftMixing, lambda layer, context: rules.Bound(1.0, relative=1e-13))


def full_mixing_counted_once():
    """FullShiftMixing's kernel, applied twice, counted once."""

    def once(layer, context):
        return rules.Bound(context.norm(layer.kernel), relative=1e-13)

    return rule(lip.layers.FullShiftMixing, once)


def residual_form_taken_as_1():
    """SDPResidualDense counted as 1-Lipschitz, its kernel not looked at."""
    return rule(
        lip.layers.SDPResidualDense, lambda layer, context: rules.Bound(1.0, relative=1e-13)
    )


def residual_form_counted_as_linear():
    """SDPResidualDense counted as if it were no more than its kernel: s for 1 + 2 (s^2 - 1)."""

    def norm(layer, context):
        return rules.Bound(max(1.0, context.norm(layer.kernel)), offset=1e3, relative=1e-13)

    return rule(lip.layers.SDPResidualDense, norm)


def sandwich_taken_as_1():
    """SandwichDense counted as 1-Lipschitz: [A B] taken to be on the manifold."""
    return rule(
        lip.layers.SandwichDense,
        lambda layer, context: rules.Bound(1.0, offset=1e3, relative=1e-13),
    )


def sandwich_counted_once():
    """SandwichDense counted as the norm of [A B], which it applies twice."""
    return rule(
        lip.layers.SandwichDense,
        lambda layer, context: rules.Bound(context.norm(layer.kernel), offset=1e3, relative=1e-13),
    )


def psi_not_divided_by():
    """The sandwich multiplied by Psi behind the activation, and not divided in front of it."""

    def scales(self):
        psi = keras.ops.exp(keras.ops.convert_to_tensor(self.log_psi))
        return np.sqrt(2) * keras.ops.ones_like(psi), psi / np.sqrt(2)

    return [(lip.layers.SandwichDense, "scales", scales)]


def reflection_by_no_unit_vector():
    """Householder's v of another length than 1: (sin t/2, -1)."""

    def call(self, inputs):
        sine = keras.ops.sin(keras.ops.convert_to_tensor(self.angle) / 2)
        first, second = keras.ops.split(inputs, 2, axis=self.axis)
        behind = 2 * keras.ops.minimum(sine * first - second, 0)
        return keras.ops.concatenate([first - sine * behind, second + behind], axis=self.axis)

    return [(lip.layers.Householder, "call", call)]


def logits_half_bounded():
    """The head's error counted without what the body passes on to it."""
    real = rounding.head_allowances
    return [
        (
            evaluation,
            "head_allowances",
            lambda logits, *arguments: real(logits, *arguments[:-1], 0 * arguments[-1]) / 64,
        )
    ]


def head_products_without_rounding():
    """The head's dot products counted as exact."""
    real = rounding.head_allowances
    return [
        (
            evaluation,
            "head_allowances",
            lambda logits, compared, r, d: real(
                logits, dataclasses.replace(compared, joint=0 * compared.joint), r, d
            ),
        )
    ]


def products_without_rounding():
    """Matrix products counted as exact."""
    real = rounding.linear
    return [
        (
            layer_rules,
            "linear",
            lambda context, norm, kernel, terms: rules.Bound(
                real(context, norm, kernel, terms).constant
            ),
        )
    ]


def inputs_without_norm():
    """The rounding of features as if inputs were of norm 1."""
    return [(evaluation, "input_norms", lambda x: np.ones(len(x)))]


# Faults of what is promised of programs.


def float32(**changes):
    """The arithmetic of float32 programs with a fault."""
    return [(PROGRAMS, "float32", dataclasses.replace(PROGRAMS["float32"], **changes))]


def unit_of_float64():
    """Float32 programs counted with the unit roundoff of float64."""
    return float32(unit=PROGRAMS["float64"].unit)


def pairwise_sums():
    """The bound of one order of summation, by halves, for that of all."""
    return [(Arithmetic, "products", lambda u, n: ((3 + np.log2(n)) * u.unit, 0.0))]


def part_of_the_sums():
    """Partial sums taken to be less than half of what they can be."""
    real = Arithmetic.products
    return [(Arithmetic, "products", lambda u, n: tuple(0.4 * v for v in real(u, n)))]


def addends_apart():
    """A bias, and a residual branch, taken to be added at the end."""
    return [(rounding, "joining", lambda *a: 0.0), (merging_rules, "joining", lambda *a: 0.0)]


def branches_apart():
    """A residual branch alone taken to be added at the end."""
    return [(merging_rules, "joining", lambda *a: 0.0)]


def addends_of_the_evaluation_apart():
    """In `certify`'s own evaluation a bias, and a residual branch, taken to be added at the end."""
    real = rounding.joining

    def joining(context, terms):
        return real(context, terms) if context.arithmetic.program else 0.0

    return [(rounding, "joining", joining), (merging_rules, "joining", joining)]


def normalizations_apart():
    """What a normalization adds taken to be added at the end of the sums in front of it."""
    return [(layer_rules, "joining", lambda *a: 0.0)]


def branches_joined_by_one():
    """Of several branches the sum of one alone taken to start with the others."""
    real = rounding.joining
    return [(merging_rules, "joining", lambda context, _: real(context, context.summed))]


def stacks_of_no_sums():
    """A sum over what was stacked taken for one of entries, not of the sums that they are."""
    return [(operation_rules, "added_up", lambda context, count: count)]


def biases_of_the_head_apart():
    """The head's biases taken to be added at the end in `certify`'s own evaluation."""
    real = rounding.head_allowances
    return [
        (
            evaluation,
            "head_allowances",
            lambda logits, compared, r, d: real(
                logits, dataclasses.replace(compared, biases=0.0), r, d
            ),
        )
    ]


def constants_as_written():
    """Constants that float32 does not hold taken for exact."""
    return [(operation_rules, "held", lambda *a: 0.0)]


def inputs_as_given():
    """Inputs not rounded to float32."""
    real = program.forward_errors
    return [(program, "forward_errors", lambda g, b, n, e, *rest: real(g, b, n, 0 * e, *rest))]


def rounding_at_the_sample():
    """What a program may be off by at x taken for that at every point of the ball."""
    real = program.Program.errors

    def errors(self, *arguments):
        constant, rates = real(self, *arguments)
        return constant, 0 * rates

    return [(program.Program, "errors", errors)]


def rounding_at_the_sample_in_balls():
    """As `rounding_at_the_sample`, of radii by constants of balls alone."""
    real = local._LocalBounds.radii
    return [(local._LocalBounds, "radii", lambda self, *a: real(self, *a[:5]))]


def norms_too_small():
    """The norms of values at the sample measured too small."""
    real = twin.Float64Twin.__call__

    def call(self, x):
        logits = real(self, x)
        self.norms = self.norms and {i: 0.4 * v for i, v in self.norms.items()}
        return logits

    return [(twin.Float64Twin, "__call__", call)]


def head_of_exact_sums():
    """The head's dot products in the program counted as exact."""
    real = program.Program._own
    return [(program.Program, "_own", lambda *a, **k: 0 * real(*a, **k))]


def shares_in_order():
    """A softmax at the end taken to keep the order of logits in float32."""
    real = program.Program._own

    def own(self, *arguments, **keywords):
        self._shares = 0
        return real(self, *arguments, **keywords)

    return [(program.Program, "_own", own)]


def diagonal_in_float64():
    """T, which an SDP layer divides by, taken to be computed in float64."""
    real = sdp_rules._Form.__init__

    def form(self, layer, context):
        real(self, layer, context)
        if context.arithmetic.name == "float32":
            self.error *= PROGRAMS["float64"].unit / context.arithmetic.unit

    return [(sdp_rules._Form, "__init__", form)]


def without_rounding(cls):
    """A layer's rule that counts no relative rounding."""
    real = rules._LAYERS[cls].function

    def exact(*arguments):
        bounds = real(*arguments)
        parts = (bounds,) if isinstance(bounds, rules.Bound) else bounds
        return tuple(dataclasses.replace(part, relative=0.0) for part in parts)

    return rule(cls, exact)


def means_of_exact_sums():
    """An average's sum counted as exact."""
    return without_rounding(keras.layers.GlobalAveragePooling1D)


def roots_of_exact_sums():
    """L2Pool's sum of squares counted as exact."""
    return without_rounding(lip.layers.L2Pool)


def factors_as_written():
    """Factors that float32 does not hold, and products with them, taken for exact."""
    return without_rounding(keras.layers.Rescaling)


def wrapped_factors_alone():
    """Factors counted where no wrapper hides them."""
    return [(program, "inner", lambda operation: operation)]


def folded_weights_stay():
    """Weights that factors were multiplied into are taken for normal numbers."""
    return [(program, "_exponent", lambda operation, name: 0)]


def nothing_vanishes():
    """No underflow in float32."""
    return float32(underflow=0.0, smallest=0.0)


def nothing_overflows():
    """No overflow in float32."""
    return float32(limit=np.inf)


def ends_in_range():
    """The range of what an SDP or sandwich layer reads and answers, not of what it computes."""
    real = sdp_rules._passed
    return [(sdp_rules, "_passed", lambda parts: (real(parts)[0], (0.0, 0.0)))]


def one_term_a_unit():
    """A sum in front of an activation counted as one number, whatever is multiplied into it."""
    real = sdp_rules._hidden
    return [(sdp_rules, "_hidden", lambda *arguments: real(*arguments[:-1], 1))]


def reach_rounded_inward():
    """Pre-activations that move by a hundredth less than they can."""
    return [(secants, "_interval", lambda v, reach: (v - 0.99 * reach, v + 0.99 * reach))]


def slopes_at_the_centre():
    """The slopes at the input itself, as if its ball had no others."""
    real = local.secants
    return [(local, "secants", lambda layer, v, off, reach: real(layer, v, off, 1e-9 * reach))]


def ball_not_enforced():
    """A ball's constant taken for what is outside it, too."""
    return [(local, "_within", lambda radii, limits: limits)]


def mean_slopes():
    """The middle of the slopes that can occur, their spread left out."""
    return [(local, "_activated", lambda c, m, h, outer: m[:, None] * c * m)]


def unproven_matrices():
    """A matrix that is too small, and no proof to reject it."""
    real = local._activated
    return [
        (local, "_holds", lambda *arguments: True),
        (local, "_activated", lambda c, m, h, outer: real(c, m, 0.8 * h, outer)),
    ]


# Each with the detector that should catch it; if that one does not, the others are asked.
MUTANTS = {
    assumed_norms: detectors.scaled_layer,
    power_iteration: detectors.noisy_kernel,
    clamped_border: detectors.replicated_border,
    duplicated_slices: detectors.series_and_volumes,
    pooled_over_two_axes: detectors.series_and_volumes,
    wrong_transpose: detectors.gradient_equality,
    shift_without_identity: detectors.gradient_equality,
    head_taken_as_normalised: detectors.unnormalised_head,
    sqrt_2_rule: detectors.opposed_classes,
    largest_over_classes: detectors.ties,
    certified_ties: detectors.ties,
    no_allowance: detectors.rounding_attack,
    float32_evaluation: detectors.affine_distances,
    biases_without_rounding: detectors.rounding_attack,
    overlap_forgotten: detectors.overlapping_windows,
    average_overlap_forgotten: detectors.overlapping_windows,
    sums_as_one_tensor: detectors.exact_arithmetic,
    largest_deviation: detectors.exact_arithmetic,
    reshaped_kernel: detectors.overlapping_windows,
    stem_forgotten: detectors.scaled_layer,
    one_sided_mixing_constant: detectors.noisy_kernel,
    full_mixing_counted_once: detectors.scaled_layer,
    residual_form_taken_as_1: detectors.residual_reflection,
    residual_form_counted_as_linear: detectors.residual_reflection,
    sandwich_taken_as_1: detectors.sandwiched_reflection,
    sandwich_counted_once: detectors.sandwiched_reflection,
    psi_not_divided_by: detectors.sandwiched_reflection,
    reflection_by_no_unit_vector: detectors.turned_pairs,
    logits_half_bounded: detectors.rounding_attack,
    head_products_without_rounding: detectors.cancelling_products,
    products_without_rounding: detectors.cancelling_products,
    inputs_without_norm: detectors.cancelling_products,
    unit_of_float64: red_team.order_of_large_sums,
    pairwise_sums: red_team.order_of_large_sums,
    part_of_the_sums: red_team.order_of_large_sums,
    addends_apart: red_team.order_of_large_sums,
    branches_apart: red_team.residual_branch,
    addends_of_the_evaluation_apart: red_team.order_of_the_evaluation,
    normalizations_apart: red_team.order_of_the_evaluation,
    branches_joined_by_one: red_team.order_of_the_evaluation,
    stacks_of_no_sums: red_team.order_of_the_evaluation,
    biases_of_the_head_apart: red_team.order_of_the_evaluation,
    constants_as_written: red_team.tied_by_float32,
    inputs_as_given: red_team.tied_by_float32,
    rounding_at_the_sample: red_team.growing_inputs,
    rounding_at_the_sample_in_balls: red_team.growing_inputs,
    norms_too_small: red_team.order_of_large_sums,
    head_of_exact_sums: red_team.order_of_large_sums,
    shares_in_order: red_team.tied_by_float32,
    diagonal_in_float64: red_team.diagonal_in_order,
    means_of_exact_sums: red_team.pools_and_factors,
    roots_of_exact_sums: red_team.pools_and_factors,
    factors_as_written: red_team.pools_and_factors,
    wrapped_factors_alone: red_team.folded_away,
    folded_weights_stay: red_team.folded_away,
    nothing_vanishes: red_team.vanishing_numbers,
    nothing_overflows: red_team.vanishing_numbers,
    ends_in_range: red_team.squares_inside,
    one_term_a_unit: red_team.folded_in_front,
    reach_rounded_inward: detectors.bends_ahead,
    slopes_at_the_centre: detectors.bends_ahead,
    ball_not_enforced: detectors.bends_ahead,
    mean_slopes: detectors.bends_ahead,
    unproven_matrices: detectors.bends_ahead,
}


@contextlib.contextmanager
def mutated(changes):
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, replacement in changes:
            if isinstance(owner, dict):
                patch.setitem(owner, name, replacement)
            else:
                patch.setattr(owner, name, replacement)
        programs._program.cache_clear()  # traced without the fault
        yield
    programs._program.cache_clear()  # and with it


def unguarded(mutant):
    """The mutant, without comparisons with the model's own predictions.

    They would refuse some faults before a detector sees them.
    """
    return mutated(
        [
            (evaluation.Evaluation, "compare", lambda *arguments: None),
            (evaluation, "as_certified", lambda own, predictions: np.ones(len(predictions), bool)),
            *mutant(),
        ]
    )


def survivors_of(mutant, detecting):
    """The detectors, in turn, that let the mutant pass; empty as soon as one catches it."""
    with unguarded(mutant):
        for detector in detecting:
            try:
                detector()
            except AssertionError:
                return []
        return [detector.__name__ for detector in detecting]


@pytest.mark.once  # what they replace is the same code on every backend
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_no_mutant_survives(mutant):
    """Every fault is caught by a detector that passes without it."""
    first = MUTANTS[mutant]
    others = [detector for detector in detectors.ALL if detector is not first]
    assert survivors_of(mutant, [first, *others]) == [], f"nobody caught: {mutant.__doc__}"


@pytest.mark.once
@pytest.mark.parametrize(
    "drift",
    [
        detectors.scaled_layer,
        detectors.changed_entry,
        detectors.noisy_kernel,
        detectors.rounded_kernel,
    ],
    ids=lambda d: d.__name__,
)
def test_every_kind_of_drift_is_seen_where_norms_are_assumed(drift):
    """One layer x 1.001, one entry + 0.05, noise, bfloat16 weights, each with K = 1."""
    assert survivors_of(assumed_norms, [drift]) == []


def test_the_gate_lets_the_library_pass():
    """And so a gate that fails everything would be noticed."""
    assert survivors_of(lambda: [], [detectors.ties]) == ["ties"]


# The naive certifier breaks under the same attack.


@pytest.mark.parametrize("dtype, offset", [("float32", 1e5), ("bfloat16", 50.0)])
def test_the_naive_rule_breaks_in_low_precision(dtype, offset):
    """Low-precision logits, K = 1, no allowance: radii beyond the true distance."""
    model = detectors.affine_model(offset)
    low = keras.Sequential([keras.Input((6,)), *_copies(model, dtype)])
    for target, source in zip(low.weights, model.weights, strict=True):
        target.assign(keras.ops.cast(to_numpy(source), dtype))
    x = np.random.default_rng(0).normal(size=(400, 6))
    logits = np.asarray(to_numpy(low(x.astype("float32"))), "float64")
    kernel = np.asarray(to_numpy(model.layers[-1].kernel), "float64")
    _, naive, _ = radius.certified_radii_float64(logits, radius.pairwise_distances_float64(kernel))
    exact_logits, truth, _ = detectors.affine_truth(model, x)
    exact = exact_logits.argmax(axis=1)
    broken = (naive > truth) | (logits.argmax(axis=1) != exact) & (naive > 0)
    assert broken.sum() > 20
    certificate = lip.certify(model, x, verbose=0)
    assert (certificate.radii <= truth).all()
    assert (certificate.predictions == exact).all()


def _copies(model, dtype):
    for layer in model.layers[1:]:
        yield type(layer).from_config({**layer.get_config(), "dtype": dtype})


# Metamorphic relations.


def test_scaling_one_layer_up_and_the_next_down_changes_nothing():
    inputs = keras.Input((6,))
    dense = [keras.layers.Dense(6, activation="relu") for _ in range(2)]
    model = keras.Model(inputs, keras.layers.Dense(4)(dense[1](dense[0](inputs))))
    x = np.random.default_rng(0).normal(size=(30, 6))
    before = lip.certify(model, x, verbose=0)
    for factor in (4.0, 2.0**-30):  # powers of two: the same function exactly
        first, second = dense[0].get_weights(), dense[1].get_weights()
        dense[0].set_weights([factor * w for w in first])
        dense[1].set_weights([second[0] / factor, second[1]])
        after = lip.certify(model, x, verbose=0)
        np.testing.assert_array_equal(after.predictions, before.predictions)
        np.testing.assert_allclose(after.radii, before.radii, rtol=1e-9)


def test_a_constant_added_to_all_logits_costs_only_its_rounding():
    model = detectors.in_float64(detectors.dense_model)
    x = np.random.default_rng(0).normal(size=(30, 6))
    before = lip.certify(model, x, verbose=0)
    detectors.assign(model.layers[-1].bias, np.full(4, 1e4))
    after = lip.certify(model, x, verbose=0)
    np.testing.assert_array_equal(after.predictions, before.predictions)
    np.testing.assert_allclose(after.radii, before.radii, atol=1e-10)
    assert (after.error_allowances > before.error_allowances).all()


def test_input_scaling_in_front_multiplies_the_constant():
    model = detectors.dense_model()
    deviations = np.array([0.5, 1.0, 2.0, 4.0, 0.25, 1.0])
    inputs = keras.Input((6,))
    scaled = keras.layers.Normalization(mean=np.full(6, 0.1), variance=deviations**2)(inputs)
    whole = keras.Model(inputs, model(scaled))
    x = np.random.default_rng(0).normal(size=(30, 6))
    ratio = lip.lipschitz_bound(whole).body_constant / lip.lipschitz_bound(model).body_constant
    assert ratio == pytest.approx(1 / 0.25, rel=1e-7)  # the smallest deviation, not the largest
    inside = (x - np.float32(0.1)) / deviations
    np.testing.assert_allclose(
        lip.certify(whole, x, verbose=0).radii,
        lip.certify(model, inside, verbose=0).radii * 0.25,
        rtol=1e-6,
    )


# Low precision.


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_low_precision_models_are_certified_from_their_stored_weights(policy, digits):
    from data import small_lipnext

    from keras_lipnext.twin import Float64Twin

    model = small_lipnext(dtype=policy, depth=1)
    _, (x, y) = digits
    x, y = x[:100], y[:100]
    model.head.bias.assign(-Float64Twin(model)(x).mean(axis=0))  # else all are of one class
    certificate = lip.certify(model, x, y, verbose=0)
    plain = small_lipnext(depth=1)
    plain.set_weights([np.asarray(to_numpy(keras.ops.cast(w, "float32"))) for w in model.weights])
    expected = lip.certify(plain, x, y, verbose=0)
    np.testing.assert_allclose(certificate.radii, expected.radii, rtol=1e-9)
    own = to_numpy(keras.ops.cast(model.predict_on_batch(x), "float32")).argmax(axis=1)
    assert certificate.low_precision_differences == (own != certificate.predictions).sum()
    assert expected.low_precision_differences is None
    if "bfloat16" in policy:
        assert certificate.low_precision_differences > 0
    if policy == "bfloat16":  # rounded kernels are not orthogonal, and K says so
        assert certificate.body_constant > 1.001
