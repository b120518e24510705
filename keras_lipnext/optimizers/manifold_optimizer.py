"""What the manifold optimizers share: telling variables apart, Adam for the others, Lookahead."""

import keras
from keras import ops

from keras_lipnext import backend
from keras_lipnext.layers._channels import number
from keras_lipnext.manifolds.constraint import Stiefel
from keras_lipnext.manifolds.polar import at_least_float32


class ManifoldOptimizer(keras.optimizers.Adam):
    """Adam whose variables marked by a `Stiefel` constraint are moved by `manifold_step`.

    Subclasses implement `manifold_step(x, gradient, learning_rate, index)`, which returns the new
    point. Keras applies the variable's constraint after every step, so rounding never accumulates.
    """

    def __init__(
        self,
        learning_rate,
        euclidean_learning_rate=None,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-7,
        lookahead_period=None,
        lookahead_step=0.5,
        **kwargs,
    ):
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
        if kwargs.pop("amsgrad", False):
            raise ValueError(
                "The manifold optimizers have no AMSGrad variant. Received: amsgrad=True"
            )
        if not isinstance(
            euclidean_learning_rate, keras.optimizers.schedules.LearningRateSchedule | None
        ):
            number("euclidean_learning_rate", euclidean_learning_rate)
        super().__init__(learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, **kwargs)
        # Multiplies both learning rates. A training loop's schedule sets it: unlike changing
        # `learning_rate`, that survives an interruption and leaves the user's rate alone.
        self.decay = self.add_variable(
            (), initializer="ones", aggregation="only_first_replica", name="decay"
        )
        self.euclidean_learning_rate = euclidean_learning_rate
        self.lookahead_period = lookahead_period
        self.lookahead_step = lookahead_step

    def build(self, variables):
        if self.built:
            return
        # On TensorFlow `update_step` receives raw tf.Variables: what it needs to know of the
        # Keras variables is noted here, by index.
        self._constraints = [v.constraint for v in variables]
        self._on_manifold = [isinstance(c, Stiefel) for c in self._constraints]
        self._manifold_keys = {
            self._var_key(v) for v, marked in zip(variables, self._on_manifold) if marked
        }
        super().build(variables)
        if self.lookahead_period:
            self._slow = self.add_optimizer_variables(variables, "slow")

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        x = backend.value(variable)
        decay = ops.cast(self.decay, "float32")
        if self.lookahead_period:
            # The slow weights start at the value before the first step, whenever that is taken.
            slow = ops.where(self.iterations == 0, x, backend.value(self._slow[index]))
        if self._on_manifold[index]:
            # In half precision 0.999 is 1, and no matrix is orthogonal.
            dtype = at_least_float32(keras.backend.standardize_dtype(x.dtype))
            arguments = (ops.cast(a, dtype) for a in (x, gradient, learning_rate * decay))
            self.assign(variable, self.manifold_step(*arguments, index))
        else:
            rate = ops.cast(self._euclidean_rate(learning_rate), "float32")
            super().update_step(gradient, variable, rate * decay)
        if self.lookahead_period:
            self._look_ahead(slow, variable, index)

    def _euclidean_rate(self, learning_rate):
        rate = self.euclidean_learning_rate
        if rate is None:
            return learning_rate
        return rate(self.iterations) if callable(rate) else rate

    def _look_ahead(self, slow, variable, index):
        """Every `lookahead_period` steps: slow <- slow + step (fast - slow), fast <- slow.

        The sum is projected by the variable's constraint. On the orthogonal group at step 1/2
        that is the exact midpoint of the geodesic: polar(A + B) = A (A^T B)^(1/2).
        """
        fast = backend.value(variable)
        constraint = self._constraints[index] or (lambda x: x)
        due = (self.iterations + 1) % self.lookahead_period == 0
        slow = ops.cond(
            due,
            lambda: ops.cast(constraint(slow + self.lookahead_step * (fast - slow)), fast.dtype),
            lambda: slow,
        )
        self.assign(self._slow[index], slow)
        self.assign(variable, ops.where(due, slow, fast))

    def _use_weight_decay(self, variable):
        # Shrinking an orthogonal matrix and projecting it back is no regularisation.
        return self._var_key(variable) not in self._manifold_keys and super()._use_weight_decay(
            variable
        )

    def _apply_weight_decay(self, variables):
        decayed = [v for v in variables if self._use_weight_decay(v)]
        if decayed:  # PyTorch's fused implementation fails on an empty list.
            super()._apply_weight_decay(decayed)

    def finalize_variable_values(self, var_list):
        super().finalize_variable_values(var_list)
        if self.use_ema:
            for variable in var_list:
                # An average of points of the manifold lies inside it. The copy: on JAX the variable
                # and the average share a buffer here, which the next step could not donate twice.
                project = variable.constraint or ops.copy
                variable.assign(project(backend.value(variable)))

    def get_config(self):
        config = super().get_config()
        del config["amsgrad"]
        rate = self.euclidean_learning_rate
        if callable(rate):
            rate = keras.optimizers.schedules.serialize(rate)
        return {
            **config,
            "euclidean_learning_rate": rate,
            "lookahead_period": self.lookahead_period,
            "lookahead_step": self.lookahead_step,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        rate = config.get("euclidean_learning_rate")
        if isinstance(rate, dict):
            config["euclidean_learning_rate"] = keras.optimizers.schedules.deserialize(
                rate, custom_objects=custom_objects
            )
        return super().from_config(config, custom_objects=custom_objects)
