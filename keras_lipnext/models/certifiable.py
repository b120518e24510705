import contextlib
import functools
import inspect
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import keras
import numpy.typing as npt
from keras import ops

from keras_lipnext import backend
from keras_lipnext.backend import keras_private
from keras_lipnext.certification.certify import certify
from keras_lipnext.distribution import check_batches, check_distribution, check_fit
from keras_lipnext.lipschitz.bounds import LipschitzBound
from keras_lipnext.lipschitz.model import lipschitz_bound, nominal_constant, read
from keras_lipnext.losses.emma import CertifiedLoss
from keras_lipnext.manifolds.constraint import Stiefel
from keras_lipnext.manifolds.polar import gram_defect, transpose
from keras_lipnext.metrics.certified import CertifiedMetric
from keras_lipnext.models.labels import check_labels, with_labels_checked
from keras_lipnext.models.training_state import (
    NOT_TRAINING,
    Schedule,
    TrainingState,
    with_weights_put_back,
)
from keras_lipnext.optimizers.manifold_optimizer import ManifoldOptimizer
from keras_lipnext.report.certificate import Certificate
from keras_lipnext.typing import Config, Path, Tensor

# What JAX's trainer hands a step: all of these, a test step no optimizer's.
JAX_STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables")


def reject_unknown(model, kwargs, known):
    """Raises for keyword arguments that Keras would silently drop."""
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        name = (model if isinstance(model, type) else type(model)).__name__
        raise ValueError(
            f"{name} does not know the arguments {unknown}. See help(keras_lipnext.{name}) for "
            "those it takes."
        )


def step_of(method, training):
    """`train_step` or `test_step`, Keras' or one's own, with what certified parts must know.

    Before a step in training its progress is counted, and metrics take the constants of the
    weights that will make its predictions. On JAX, where a step gets the model's state as an
    argument, that state is changed; and what the loss reads of the model holds its traced value
    as long as the step runs: guides compute the loss outside any scope.
    """

    @functools.wraps(method)
    def step(self, *args):
        if getattr(self._thread, "in_step", False):  # `super().train_step` of one's own step
            return method(self, *args)
        self._thread.in_step = True
        try:
            if keras.backend.backend() == "jax":
                return self._jax_step(method, training, *args)
            self._begin_step(training)
            return method(self, *args)
        finally:
            self._thread.in_step = False

    return step


@keras.saving.register_keras_serializable("keras_lipnext")
class CertifiableModel(keras.Model):
    """A functional classifier that knows its Lipschitz constants.

    A `keras.Model` of 1-Lipschitz layers that ends in a linear head, `NormalizedDense` as a rule.
    It gives certified losses and metrics the head's pairwise constants, keeps count of the
    training's progress for their ramps, and certifies itself.

    Example:

    ```python
    inputs = keras.Input((32, 32, 3))
    x = keras_lipnext.layers.PatchEmbedding(patch_size=4, units=128)(inputs)
    x = keras_lipnext.layers.LipNeXtBlock()(x)
    x = keras_lipnext.layers.L2Pool()(x)
    outputs = keras_lipnext.layers.NormalizedDense(10)(x)
    model = keras_lipnext.CertifiableModel(inputs, outputs)
    model.compile(
        keras_lipnext.optimizers.ManifoldAdam(1e-3),
        loss=keras_lipnext.losses.EMMA(epsilon=36 / 255),
        metrics=["accuracy", keras_lipnext.metrics.CertifiedAccuracy(36 / 255)],
    )
    ```

    Args:
        inputs: `keras.Input`.
        outputs: Symbolic logits, shape (batch, classes), or (batch, ..., classes) of dense outputs,
            made by the head.
        name: Name of the model.

    Raises:
        ValueError: naming the layer, if one has no known Lipschitz constant or one that training
            can change, or if the last layer is not a linear head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # From 3.12 on Keras rebuilds a functional subclass of this signature from its graph.
        reject_unknown(self, kwargs, ("inputs", "outputs", "name", "trainable"))
        check_distribution()
        super().__init__(*args, **kwargs)
        certifiable = read(self)
        if certifiable.head is None or certifiable.shares:
            last = keras_private.node_of(self.outputs[0]).operation
            raise ValueError(
                "A CertifiableModel ends in a linear head that makes logits of shape (batch, "
                "classes), or of each position (batch, ..., classes), "
                "keras_lipnext.layers.NormalizedDense(classes). Received: last layer "
                f"'{last.name}' ({type(last).__name__}), output shape {self.output_shape}. "
                "Softmax belongs into the loss."
            )
        self._nominal_constant = nominal_constant(certifiable)
        head = certifiable.head.operation
        self._find_head = lambda: head  # as an attribute Keras would track and save it twice
        body = [step.operation for step in certifiable.body.steps]
        self._find_body = lambda: body
        self._find_metrics = lambda: []
        self._evaluating = False
        self._labels_in_batches = True  # not checked before the first step
        self._thread = threading.local()  # replicas of tf.distribute run in threads
        self._state = TrainingState()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name, training in (("train_step", True), ("test_step", False)):
            if name in vars(cls):
                setattr(cls, name, step_of(vars(cls)[name], training))

    @property
    def head(self) -> keras.layers.Layer:
        """The linear layer that makes the logits."""
        return self._find_head()

    def lipschitz_bound(self) -> LipschitzBound:
        """Proven Lipschitz bound; see `keras_lipnext.certification.lipschitz_bound`."""
        return lipschitz_bound(self)

    def certify(self, x: Any, y: npt.ArrayLike | None = None, **kwargs: Any) -> Certificate:
        """Certifies predictions on data; see `keras_lipnext.certify`."""
        return certify(self, x, y, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configures training, as `keras.Model.compile`, and binds certified losses and metrics.

        Each is copied before it is bound, so that models can share them.
        """
        arguments = inspect.signature(super().compile).bind(*args, **kwargs)
        config = arguments.arguments
        metrics = []  # Keras shows those that it was given only once it has built them
        self._find_metrics = lambda: metrics
        for key in ("loss", "metrics", "weighted_metrics"):
            if key in config:
                config[key] = keras.tree.map_structure(self._bound_copy, config[key])
        super().compile(*arguments.args, **arguments.kwargs)
        if isinstance(self._stepping_optimizer, ManifoldOptimizer):
            self._stepping_optimizer.bind(self._progress_of_schedules)
        self._requested_jit = config.get("jit_compile", "auto")

    @property
    def _stepping_optimizer(self) -> Any:
        """The optimizer, or what is inside one that scales the loss."""
        return getattr(self.optimizer, "inner_optimizer", self.optimizer)

    def _bound_copy(self, part):
        if isinstance(part, CertifiedMetric):
            copy = type(part).from_config(part.get_config())
            self._find_metrics().append(copy.bind(self.head, self._metrics_constant))
            return copy
        if not isinstance(part, CertifiedLoss):
            return part
        # Not copy.copy: Keras' objects copy by serialisation, which drops the dtype.
        copy = object.__new__(type(part))
        vars(copy).update(vars(part), _head=None)
        return copy.bind(self.head, self._nominal_constant, self._training_progress)

    def _training_progress(self):
        """Share of the training done: 1, the full demand, in evaluation."""
        return ops.ones(()) if self._evaluating else self._state.progress.value

    def _progress_of_schedules(self):
        """Share of the training done in the middle of the step; negative while no `fit` runs."""
        return self._state.middle.value

    def _metrics_constant(self):
        """K for metrics: in evaluation at least what the weights' distances from manifolds add.

        Every marked kernel W counts as orthogonal in the nominal constant. With E = W^T W - I its
        layer's constant is at most 1 + 2 ||E|| times that; so is, of weights that are visibly off,
        what `lipschitz_bound` proves. Where it refuses the weights nothing is certified.
        """
        if not self._evaluating:
            return self._nominal_constant
        marked = [
            weight
            for operation in self._find_body()
            for weight in getattr(operation, "weights", ())
            if isinstance(weight.constraint, Stiefel)
        ]
        if not marked:
            return self._nominal_constant
        with backend.inference_scope():
            kernels = [ops.cast(backend.value(weight), "float32") for weight in marked]
            tall = [w if w.shape[-2] >= w.shape[-1] else transpose(w) for w in kernels]
            squares = ops.stack([ops.sum(ops.square(gram_defect(w))) for w in tall])
            growth = float(ops.prod(1 + 2 * ops.sqrt(squares)))
        if growth < 1.001:
            return self._nominal_constant * growth
        try:
            return lipschitz_bound(self, verbose=0).body_constant
        except (ValueError, RuntimeError):
            return 0.0

    def _read_constants(self):
        attached = [metric for metric in self.metrics if isinstance(metric, CertifiedMetric)]
        for metric in (*self._find_metrics(), *attached):
            metric.read_constants()

    def reset_metrics(self) -> None:
        super().reset_metrics()
        self._read_constants()  # of metrics that Keras has yet to build, too

    @functools.partial(step_of, training=True)
    def train_step(self, *args: Any) -> Any:
        return super().train_step(*args)

    @functools.partial(step_of, training=False)
    def test_step(self, *args: Any) -> Any:
        return super().test_step(*args)

    def _begin_step(self, training):
        if training:
            self._state.advance()
            self._read_constants()

    @property
    def _counts(self):
        """Whether a step can count: on JAX its state is that of the model's `metrics`."""
        listed = any(metric is self._state for metric in self.metrics)
        return listed or keras.backend.backend() != "jax"

    def _jax_step(self, method, training, state, data):
        weights = [*self.trainable_variables, *self.non_trainable_variables]
        values = [*state[0], *state[1], *state[-1]]
        mapping = list(zip([*weights, *self.metrics_variables], values))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._begin_step(training)
        metrics = [scope.get_current_value(v) for v in self.metrics_variables]
        held = {"kernel": (self.head.kernel, scope.get_current_value(self.head.kernel))}
        # A model whose `metrics` leave the state out cannot count: full demand.
        counted = self._counts
        for variable, uncounted in (
            (self._state.progress, 1.0),
            (self._state.middle, NOT_TRAINING),
        ):
            value = scope.get_current_value(variable)
            held[variable.name] = variable, value if counted else ops.full((), uncounted)
        before = [(variable, keras_private.held_value(variable)) for variable, _ in held.values()]
        try:
            for variable, value in held.values():
                keras_private.hold(variable, value)
            return method(self, (*state[:-1], metrics), data)
        finally:
            for variable, value in before:
                keras_private.hold(variable, value)

    def stateless_call(
        self, trainable_variables: Sequence[Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        if getattr(self._thread, "in_step", False):
            # Of these variables a step differentiates the loss: of this kernel, too.
            for variable, value in zip(self.trainable_variables, trainable_variables):
                if variable is self.head.kernel:
                    keras_private.hold(variable, value)
        return super().stateless_call(trainable_variables, *args, **kwargs)

    def make_train_function(self, force: bool = False) -> None:
        self._with_labels_checked("train_function", super().make_train_function, force)

    def make_test_function(self, force: bool = False) -> None:
        self._with_labels_checked("test_function", super().make_test_function, force)

    def _with_labels_checked(self, name, make, force):
        before = getattr(self, name)
        self._thread.checks_labels = True
        try:
            make(force)
        finally:
            self._thread.checks_labels = False
        function = getattr(self, name)
        if function is not before and keras.backend.backend() != "tensorflow":
            setattr(self, name, functools.partial(self._run_on_checked, function))

    def _autoconvert_optionals(self, step_func):
        """Keras' own, of TensorFlow's batches in front of what XLA compiles: checks their labels.

        There, and not on the host, which would take the batches out of the program that runs
        `steps_per_execution` steps.
        """
        if not getattr(self._thread, "checks_labels", False):  # predictions need no labels
            return super()._autoconvert_optionals(step_func)

        def step_on_checked(data):
            if self._certifies_labels():
                check = functools.partial(with_labels_checked, output_shape=self.output_shape)
                data = self.distribute_strategy.run(check, args=(data,))
            return step_func(data)

        return super()._autoconvert_optionals(step_on_checked)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Keras' own, of TensorFlow; makes optimizer and metrics before a step is traced.

        A trace that makes variables is thrown away, and the step traced once more.
        """
        super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        keras_private.make_state(self, iterator, data_batch)

    def _run_on_checked(self, function, *args):
        """A step, on JAX and PyTorch, after a look at its labels where they lie on the host."""
        *state, batches = args
        try:
            batches = list(itertools.islice(batches, self.steps_per_execution))
            if self._labels_in_batches:
                for batch in batches:
                    self._check_labels(keras.utils.unpack_x_y_sample_weight(batch)[1])
        except Exception:
            if state:
                # Keras has taken the state away from the model: else it would be lost.
                *others, metrics = state[0]
                self._jax_state = {**dict(zip(JAX_STATE, others)), "metrics_variables": metrics}
                self._jax_state_synced = False
                self.jax_state_sync()
            raise
        return function(*state, iter(batches) if state else batches)

    def _certifies_labels(self):
        return any(isinstance(loss, CertifiedLoss) for loss in keras.tree.flatten(self.loss))

    def _check_labels(self, y):
        if self._certifies_labels():
            check_labels(y, self.output_shape)

    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Trains, as `keras.Model.fit`, keeping count of the progress for the losses' ramps.

        Labels outside the classes are an error of certified losses: before the first step where
        they are arrays, at the first bad batch elsewhere. Weights that averaging (`use_ema`) has
        moved off their constraints are put back.
        """
        check_distribution()
        arguments = inspect.signature(super().fit).bind(*args, **kwargs)
        options = arguments.arguments
        check_fit(**options)
        if getattr(self._stepping_optimizer, "schedule", None) is not None and not self._counts:
            raise ValueError(
                f"On JAX the optimizer's `schedule` needs the training's state among the metrics "
                f"of {type(self).__name__}, whose property `metrics` leaves it out: return "
                f"[*super().metrics, ...] there. Received: schedule="
                f"{self._stepping_optimizer.schedule!r}"
            )
        schedule = Schedule(self._state)
        options["callbacks"] = [schedule, *with_weights_put_back(options.get("callbacks"))]
        validation = options.get("validation_data")
        if isinstance(validation, (list, tuple)):
            self._check_labels(validation[1])
        try:
            with self._labels_of(options.get("y")):
                return super().fit(*arguments.args, **arguments.kwargs)
        finally:
            schedule.finish()

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates, as `keras.Model.evaluate`; first checks that batches fit the devices.

        Averages that SwapEMAWeights evaluates are put back where constraints keep weights.
        """
        arguments = inspect.signature(super().evaluate).bind(*args, **kwargs)
        options = arguments.arguments
        if not isinstance(options.get("callbacks"), keras.callbacks.CallbackList):  # not of `fit`
            options["callbacks"] = with_weights_put_back(options.get("callbacks"))
        with self._labels_of(options.get("y")), self._evaluation():
            return self._checked(super().evaluate, *arguments.args, **arguments.kwargs)

    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        with self._evaluation():
            return super().test_on_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluation(self):
        before, self._evaluating = self._evaluating, True
        try:
            yield
        finally:
            self._evaluating = before

    @contextlib.contextmanager
    def _labels_of(self, y):
        """Checks labels given as an array; batches of them need no look then."""
        if y is not None:
            self._check_labels(y)
        before, self._labels_in_batches = self._labels_in_batches, y is None
        try:
            yield
        finally:
            self._labels_in_batches = before

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts, as `keras.Model.predict`; first checks that batches fit the devices."""
        return self._checked(super().predict, *args, **kwargs)

    @staticmethod
    def _checked(method, *args, **kwargs):
        options = inspect.signature(method).bind(*args, **kwargs).arguments
        check_batches(options.get("x"), options.get("batch_size"), options.get("steps"))
        return method(*args, **kwargs)

    def save(self, filepath: Path, *args: Any, **kwargs: Any) -> None:
        """Saves, as `keras.Model.save`, to a .keras file.

        A program that loads it imports keras_lipnext first.

        Raises:
            ValueError: for HDF5, which Keras writes, but does not load such models from unless
                `custom_objects` name each class.
        """
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                f"Keras loads a {type(self).__name__} from an HDF5 file only where "
                "`custom_objects` name each class of it: save it as model.save('name.keras'), or "
                "its weights by model.save_weights('name.weights.h5'). Received: "
                f"filepath={str(filepath)!r}"
            )
        return super().save(filepath, *args, **kwargs)

    def get_compile_config(self) -> Config | None:
        # Keras saves what "auto" became here: a model from JAX would ask PyTorch for torch.compile.
        config = super().get_compile_config()
        return {**config, "jit_compile": self._requested_jit} if config else config

    def compile_from_config(self, config: Config) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)
