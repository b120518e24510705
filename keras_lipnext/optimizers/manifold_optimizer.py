"""What the manifold optimizers share: stacks, Adam for other variables, drift removal, Lookahead.

Variables of one kind, shape and dtype are stepped as one stack: a network of 32 blocks costs a
handful of batched operations, and as many lines of a compiled program, instead of thousands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_lipnext import backend
from keras_lipnext.arguments import number, share
from keras_lipnext.backend.keras_private import batches_seen, variable_index, variable_key
from keras_lipnext.distribution import check_distribution
from keras_lipnext.manifolds import branchless, stiefel
from keras_lipnext.manifolds.constraint import Stiefel
from keras_lipnext.manifolds.polar import EPSILON, at_least_float32, largest_finite, transpose
from keras_lipnext.typing import Config, LearningRate, Tensor

# Rotations drift by about one epsilon of the dtype a step, in entries; a projection costs two
# products.
PROJECTION_PERIOD = 8
# Entries of a stack: larger variables are stepped one by one, which needs less memory and, where a
# stack would not fit into the caches, is faster.
STACK_ENTRIES = 2**20
# On accelerators each stack costs the starts of its kernels; 512 MiB in float32, and a step needs
# about eight times that beside it.
ACCELERATOR_STACK_ENTRIES = 2**27


class ManifoldOptimizer(keras.optimizers.Optimizer):
    """Moves variables marked by a `Stiefel` constraint by `manifold_step`, the others by Adam.

    Subclasses implement `manifold_step(x, gradient, learning_rate, moments)` on stacks of matrices,
    shape (n, rows, columns), and name in `moment_names` the state they keep of each. It returns
    the new points and the new moments. The points may drift from the manifold by rounding:
    `remove_drift` is applied to square ones every `PROJECTION_PERIOD` steps, whenever one is
    visibly off, and all are projected at the end of `fit`.

    With `schedule` both learning rates are multiplied, step by step, by its value at the share of
    the training done, which a `CertifiableModel` tells its optimizer.
    """

    moment_names: tuple[str, ...] = ()

    def __init__(
        self,
        learning_rate: LearningRate,
        euclidean_learning_rate: LearningRate | None = None,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        lookahead_period: int | None = None,
        lookahead_step: float = 0.5,
        precision: str = "auto",
        schedule: keras.optimizers.schedules.LearningRateSchedule | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(lookahead_period, bool) or not (
            lookahead_period is None
            or (isinstance(lookahead_period, int) and lookahead_period >= 1)
        ):
            raise ValueError(
                "`lookahead_period`, the steps between two updates of the slow weights, must be a "
                f"positive integer or None. Received: lookahead_period={lookahead_period!r}"
            )
        if not 0 < number("lookahead_step", lookahead_step) <= 1:
            raise ValueError(
                f"`lookahead_step` must be in (0, 1]. Received: lookahead_step={lookahead_step!r}"
            )
        if not isinstance(
            euclidean_learning_rate, keras.optimizers.schedules.LearningRateSchedule | None
        ):
            number("euclidean_learning_rate", euclidean_learning_rate)
        for name, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            share(name, value)
        if not number("epsilon", epsilon) >= 0:
            raise ValueError(f"`epsilon` must not be negative. Received: epsilon={epsilon!r}")
        if precision not in ("auto", "float32"):
            raise ValueError(
                "`precision` must be 'auto', as each product needs it, or 'float32'. Received: "
                f"precision={precision!r}"
            )
        if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule | None):
            raise ValueError(
                "`schedule` must be a LearningRateSchedule, of the share of the training done in "
                "place of steps, e.g. keras_lipnext.optimizers.cosine(). Received: "
                f"schedule={schedule!r}"
            )
        super().__init__(learning_rate, **kwargs)
        # Multiplies both learning rates. The schedule sets it: unlike changing `learning_rate`,
        # that leaves the user's rate alone.
        self.decay = self.add_variable(
            (), initializer="ones", aggregation="only_first_replica", name="decay"
        )
        self.euclidean_learning_rate = euclidean_learning_rate
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.lookahead_period = lookahead_period
        self.lookahead_step = lookahead_step
        self.precision = precision
        self.schedule = schedule
        self._progress: Callable[[], Tensor] | None = None
        # (group of processes,) that share the steps of matrices.
        self._sharing: tuple[Any] | None = None

    def bind(self, progress: Callable[[], Tensor]) -> Self:
        """Tells `schedule` where the training stands; `CertifiableModel.compile` does it.

        Args:
            progress: Function that returns the share of the training done, a scalar in [0, 1]; a
                negative number while no `fit` runs, where the schedule does not act.
        """
        self._progress = progress
        return self

    def share_steps(self, group: Any = None) -> Self:
        """Has each process take the steps of its share of the matrices (PyTorch).

        For processes that hold the same weights and gradients, as `DistributedDataParallel` leaves
        them: each computes what is costly, the step along the manifold, for 1 / processes of the
        matrices of one shape, and gets the others' results, points and moments. Without it each
        takes all steps. Call it in all processes, and then the optimizer in all of them, too.
        It is not saved with the optimizer.

        Example:

        ```python title="Not run: needs processes started by torchrun"
        torch.distributed.init_process_group("nccl")
        forward = torch.nn.parallel.DistributedDataParallel(model)
        model.optimizer.share_steps()
        ```

        Args:
            group: Process group of `torch.distributed`, None for all processes.

        Raises:
            ValueError: on JAX and TensorFlow, or before `init_process_group`.
        """
        backend.check_process_group()
        self._sharing = (group,)
        return self

    def _scheduled(self, schedule: keras.optimizers.schedules.LearningRateSchedule) -> Tensor:
        """The schedule's value in this step."""
        if self._progress is None:
            raise ValueError(
                f"The `schedule` of {type(self).__name__} counts the share of the training done, "
                "which keras_lipnext.CertifiableModel tells it. In other models call "
                "optimizer.bind(progress), or give a schedule of steps as `learning_rate`."
            )
        done = ops.cast(self._progress(), "float32")
        return ops.where(done < 0, 1.0, schedule(ops.maximum(done, 0.0)))

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        check_distribution()
        # On TensorFlow `update_step` receives raw tf.Variables: what it needs to know of the
        # Keras variables is noted here, by index.
        self._constraints = [v.constraint for v in variables]
        self._on_manifold = [isinstance(c, Stiefel) for c in self._constraints]
        for variable, marked in zip(variables, self._on_manifold):
            if marked and len(variable.shape) < 2:
                raise ValueError(
                    "A Stiefel constraint marks matrices, shape (..., rows, columns). Received: "
                    f"variable {variable.path} of shape {tuple(variable.shape)}"
                )
        self._manifold_keys = {
            variable_key(self, v) for v, marked in zip(variables, self._on_manifold) if marked
        }
        super().build(variables)
        self._kinds, self._moments = [], []
        for variable, marked in zip(variables, self._on_manifold):
            # Elementwise steps need no other sharding than the variable's own.
            sharding = backend.sharding_of(variable) if marked else None
            self._kinds.append((marked, tuple(variable.shape), variable.dtype, sharding))
            names = self.moment_names if marked else ("momentum", "velocity")
            self._moments.append(
                [self.add_variable_from_reference(variable, name=name) for name in names]
            )
        if self.lookahead_period:
            self._slow = self.add_optimizer_variables(variables, "slow")
            # 1 for variables that have taken a step: their slow weights begin with the first one,
            # whenever that is.
            self._started = self.add_variable(
                (len(variables),), aggregation="only_first_replica", name="started"
            )

    def _backend_apply_gradients(
        self, grads: Sequence[Tensor], trainable_variables: list[keras.Variable]
    ) -> None:
        if self.schedule is not None:
            self.decay.assign(self._scheduled(self.schedule))
        super()._backend_apply_gradients(grads, trainable_variables)
        if backend.replicas() > 1 or (self.use_ema and self.ema_overwrite_frequency):
            # Averages that overwrite variables lie off the manifold; replicas share constraints.
            return
        # Next, Keras projects by its constraint each variable left in this list, which is the
        # step's own. The constraints themselves stay where they are: other threads read them.
        trainable_variables[:] = [
            v for v in trainable_variables if not self._on_manifold[variable_index(self, v)]
        ]

    def _backend_update_step(
        self,
        grads: Sequence[Tensor],
        trainable_variables: list[keras.Variable],
        learning_rate: Tensor,
    ) -> None:
        if backend.replicas() > 1:
            # Keras sums the gradients of the replicas there, and calls `update_step`.
            return super()._backend_update_step(grads, trainable_variables, learning_rate)
        stacks = {}
        for gradient, variable in zip(grads, trainable_variables):
            index = variable_index(self, variable)
            stacks.setdefault(self._kinds[index], []).append((gradient, variable, index))
        for (_, shape, _, sharding), members in stacks.items():
            entries = STACK_ENTRIES if backend.on_cpu() else ACCELERATOR_STACK_ENTRIES
            count = max(1, entries // max(1, math.prod(shape)))
            count *= backend.devices_of(sharding)
            if self._sharing:
                count *= backend.processes_of(*self._sharing)
            for first in range(0, len(members), count):
                self._step(members[first : first + count], learning_rate)

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        self._step([(gradient, variable, variable_index(self, variable))], learning_rate)

    def _step(self, members: Sequence[tuple[Tensor, Any, int]], learning_rate: Tensor) -> None:
        """One step of variables of the same kind, shape and dtype: (gradient, variable, index)."""
        gradients, variables, indices = zip(*members)
        moments = list(zip(*(self._moments[i] for i in indices)))
        marked, *_, sharding = self._kinds[indices[0]]
        with backend.inference_scope():
            x, gradient, *state = (
                backend.stacked(values, sharding) for values in (variables, gradients, *moments)
            )
            rate = ops.cast(self.decay, "float32")
            if marked:
                rate = rate * ops.cast(learning_rate, "float32")
                new, state = self._manifold_steps(x, gradient, rate, state)
            else:
                rate = rate * ops.cast(self._euclidean_rate(learning_rate), "float32")
                gradient = ops.cast(gradient, x.dtype)
                direction, state = self.adam(gradient, ops.cast(rate, x.dtype), state)
                new = x - direction
            if self.lookahead_period:
                new = self._look_ahead(x, new, indices, sharding)
            for targets, values in zip((variables, *moments), (new, *state)):
                backend.assign_stacked(self, targets, values, sharding)

    def manifold_step(
        self, x: Tensor, gradient: Tensor, learning_rate: Tensor, moments: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """(new points, new moments) of a stack of matrices, in float32 or float64.

        Args:
            x: Points, shape (n, rows, columns).
            gradient: Gradients of the loss, of the same shape.
            learning_rate: Scalar.
            moments: Stacks like `x`, one for each of `moment_names`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `manifold_step(x, gradient, learning_rate, "
            "moments)`: see ManifoldOptimizer."
        )

    def _manifold_steps(
        self, x: Tensor, gradient: Tensor, learning_rate: Tensor, moments: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """`_step_on_manifold`, which processes share if they are to."""
        if not self._sharing or len(x) == 1:
            return self._step_on_manifold(x, gradient, learning_rate, moments)

        def stepped(x: Tensor, gradient: Tensor, *moments: Tensor) -> list[Tensor]:
            new, found = self._step_on_manifold(x, gradient, learning_rate, list(moments))
            return [new, *found]

        new, *found = backend.in_shares(stepped, (x, gradient, *moments), *self._sharing)
        return new, found

    def _step_on_manifold(
        self, x: Tensor, gradient: Tensor, learning_rate: Tensor, moments: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        # In half precision 0.999 is 1, and no matrix is orthogonal.
        dtype = at_least_float32(keras.backend.standardize_dtype(x.dtype))
        new, gradient, learning_rate = (ops.cast(a, dtype) for a in (x, gradient, learning_rate))
        moments = [ops.cast(m, dtype) for m in moments]
        new, moments = self.manifold_step(new, gradient, learning_rate, moments)
        if x.shape[-1] != x.shape[-2]:
            return ops.cast(new, x.dtype), moments
        if self.rough(new):
            new = branchless.remove_drift(new, ops.cast(self.iterations, "int32"))
        else:
            due = ops.logical_or(self.iterations % PROJECTION_PERIOD == 0, _has_left(new))
            new = _applied_if(due, self.remove_drift, new)
        return ops.cast(new, x.dtype), moments

    remove_drift = staticmethod(stiefel.projx)

    def rough(self, x: Tensor) -> bool:
        """Whether a step of `x` takes the ways of accelerators, in less than float32 where it may.

        Steps of variables in half precision are computed in float32; float64 was asked for.
        """
        dtype = keras.backend.standardize_dtype(x.dtype)
        return self.precision == "auto" and dtype == "float32" and not backend.on_cpu()

    def direction_precision(self, x: Tensor) -> str:
        """What the products of a direction may lose; see `backend.matmul`."""
        return "direction" if self.rough(x) else "exact"

    def adam(
        self, gradient: Tensor, learning_rate: Tensor, moments: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """(what Adam subtracts, its new moments), in the order of Keras' operations.

        lr * m_hat / (sqrt(v_hat) + epsilon / sqrt(1 - beta_2^t)), in the efficient form of Kingma
        and Ba, section 2.
        """
        m, v = moments
        dtype = keras.backend.standardize_dtype(gradient.dtype)
        step = ops.cast(self.iterations + 1, dtype)
        power_1, power_2 = (ops.power(ops.cast(b, dtype), step) for b in (self.beta_1, self.beta_2))
        alpha = learning_rate * ops.sqrt(1 - power_2) / (1 - power_1)
        m = m + (gradient - m) * (1 - self.beta_1)
        v = v + (ops.square(gradient) - v) * (1 - self.beta_2)
        return m * alpha / (ops.sqrt(v) + self.epsilon), [m, v]

    def _euclidean_rate(self, learning_rate: Tensor) -> Tensor:
        rate = self.euclidean_learning_rate
        if rate is None:
            return learning_rate
        # Of what Keras' schedules count: batches, whether or not their gradients are accumulated.
        return rate(batches_seen(self)) if callable(rate) else rate

    def _look_ahead(
        self, old: Tensor, fast: Tensor, indices: Sequence[int] | np.ndarray, sharding: Any
    ) -> Tensor:
        """Every `lookahead_period` steps: slow <- slow + step (fast - slow), fast <- slow.

        The sum is projected by the variable's constraint. On the orthogonal group at step 1/2
        that is the exact midpoint of the geodesic: polar(A + B) = A (A^T B)^(1/2).
        """
        variables = [self._slow[i] for i in indices]
        slow = backend.stacked(variables, sharding)
        # The stacks repeat their members where they are dealt out to devices.
        indices = np.resize(indices, slow.shape[0])
        before = ops.take(backend.value(self._started), indices, axis=0) > 0
        slow = ops.where(ops.reshape(before, (-1,) + (1,) * (len(slow.shape) - 1)), slow, old)
        now = np.isin(np.arange(len(self._slow)), indices)
        self.assign(self._started, ops.maximum(self._started, now.astype("float32")))
        due = (self.iterations + 1) % self.lookahead_period == 0
        moved = slow + self.lookahead_step * (fast - slow)
        if self._on_manifold[indices[0]]:
            moved = ops.cast(_applied_if(due, stiefel.projx, moved), slow.dtype)
        elif any(self._constraints[i] for i in indices):
            members = zip(indices, ops.unstack(moved, len(indices)))
            moved = ops.stack([(self._constraints[i] or ops.copy)(v) for i, v in members])
        slow = ops.where(due, moved, slow)
        backend.assign_stacked(self, variables, slow, sharding)
        return ops.where(due, slow, fast)

    def _use_weight_decay(self, variable: Any) -> bool:
        # Shrinking an orthogonal matrix and projecting it back is no regularisation.
        if variable_key(self, variable) in self._manifold_keys:
            return False
        return super()._use_weight_decay(variable)

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        decayed = [v for v in variables if self._use_weight_decay(v)]
        if decayed:  # PyTorch's fused implementation fails on an empty list.
            super()._apply_weight_decay(decayed)

    def finalize_variable_values(self, var_list: list[keras.Variable]) -> None:
        if not all(map(backend.has_value, (*var_list, *self.variables))):
            return  # JAX: given to a step that failed, whose error is to be seen
        super().finalize_variable_values(var_list)
        for variable in var_list:
            # The last steps have drifted, and an average of points lies inside the manifold. The
            # copy: on JAX variable and average share a buffer, which cannot be donated twice.
            if self.use_ema or isinstance(variable.constraint, Stiefel):
                project = variable.constraint or ops.copy
                variable.assign(project(backend.value(variable)))

    def get_config(self) -> Config:
        schedules = {
            name: keras.optimizers.schedules.serialize(value) if callable(value) else value
            for name in ("euclidean_learning_rate", "schedule")
            for value in (getattr(self, name),)
        }
        return {
            **super().get_config(),
            **schedules,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "lookahead_period": self.lookahead_period,
            "lookahead_step": self.lookahead_step,
            "precision": self.precision,
        }

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> Self:
        config = dict(config)
        for name in ("euclidean_learning_rate", "schedule"):
            if isinstance(config.get(name), dict):
                config[name] = keras.optimizers.schedules.deserialize(
                    config[name], custom_objects=custom_objects
                )
        return super().from_config(config, custom_objects=custom_objects)


def _applied_if(condition: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` or `x`. No lambdas: outside jit JAX compiles anew for each function object."""
    return ops.switch(ops.cast(condition, "int32"), (_unchanged, function), x)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _has_left(x: Tensor) -> Tensor:
    """Whether square matrices are visibly off the manifold, by `X^T X v` for one vector v of signs.

    Rounding alone leaves entries of `X^T X v - v` below `epsilon * sqrt(n)`. Projections that a
    variable missed, having had no gradient then, or weights that were set, leave more.
    """
    n = x.shape[-1]
    signs = np.random.default_rng(n).choice([-1.0, 1.0], size=(n, 1))
    signs = ops.convert_to_tensor(signs, dtype=x.dtype)
    missing = backend.matmul(transpose(x), backend.matmul(x, signs)) - signs
    epsilon = EPSILON[keras.backend.standardize_dtype(x.dtype)]
    return largest_finite(ops.abs(missing)) > 2 * epsilon * math.sqrt(n)
