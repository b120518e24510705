import inspect

import keras
from keras import ops

from keras_lipnext.certification.certify import certify
from keras_lipnext.certification.lipschitz import lipschitz_bound, nominal_constant, read
from keras_lipnext.certification.radius import pairwise_distances
from keras_lipnext.distribution import check_batches, check_distribution, check_fit
from keras_lipnext.losses.emma import CertifiedLoss
from keras_lipnext.metrics.certified import CertifiedMetric
from keras_lipnext.models.training_state import Schedule, TrainingState


def reject_unknown(model, kwargs, known):
    """Raises for keyword arguments that Keras would silently drop."""
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        name = (model if isinstance(model, type) else type(model)).__name__
        raise ValueError(
            f"{name} does not know the arguments {unknown}. See help(keras_lipnext.{name}) for "
            "those it takes."
        )


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
        outputs: Symbolic logits, shape (batch, classes), made by the head.
        name: Name of the model.

    Raises:
        ValueError: naming the layer, if one has no known Lipschitz constant or one that training
            can change, or if the last layer is not a linear head.
    """

    def __init__(self, *args, **kwargs):
        # From 3.12 on Keras rebuilds a functional subclass of this signature from its graph.
        reject_unknown(self, kwargs, ("inputs", "outputs", "name", "trainable"))
        check_distribution()
        super().__init__(*args, **kwargs)
        certifiable = read(self)
        if certifiable.head is None or certifiable.shares:
            last = self.outputs[0]._keras_history.operation
            raise ValueError(
                "A CertifiableModel ends in a linear head that makes logits of shape (batch, "
                "classes), keras_lipnext.layers.NormalizedDense(classes). Received: last layer "
                f"'{last.name}' ({type(last).__name__}), output shape {self.output_shape}. "
                "Softmax belongs into the loss."
            )
        self._nominal_constant = nominal_constant(certifiable)
        head = certifiable.head.operation
        self._find_head = lambda: head  # as an attribute Keras would track and save it twice
        self._cosine = False
        self._in_training = False
        self._state = TrainingState(head.units)

    @property
    def head(self):
        """The linear layer that makes the logits."""
        return self._find_head()

    def lipschitz_bound(self):
        """Proven Lipschitz bound; see `keras_lipnext.certification.lipschitz_bound`."""
        return lipschitz_bound(self)

    def certify(self, x, y=None, **kwargs):
        """Certifies predictions on data; see `keras_lipnext.certify`."""
        return certify(self, x, y, **kwargs)

    def compile(self, *args, **kwargs):
        """Configures training, as `keras.Model.compile`, and binds certified losses and metrics.

        A certified loss is copied before it is bound, so that models can share one.
        """
        arguments = inspect.signature(super().compile).bind(*args, **kwargs)
        config = arguments.arguments
        if "loss" in config:
            config["loss"] = keras.tree.map_structure(self._bound_copy, config["loss"])
        for key in ("metrics", "weighted_metrics"):
            for metric in keras.tree.flatten(config.get(key)):
                if isinstance(metric, CertifiedMetric):
                    metric.bind(lambda: self._state.distances.value)
        super().compile(*arguments.args, **arguments.kwargs)
        self._cosine = False
        self._requested_jit = config.get("jit_compile", "auto")

    def _bound_copy(self, loss):
        if not isinstance(loss, CertifiedLoss):
            return loss
        # Not copy.copy: Keras' objects copy by serialisation, which drops the dtype.
        copy = object.__new__(type(loss))
        vars(copy).update(vars(loss))
        return copy.bind(self.head, self._nominal_constant, self._training_progress)

    def _training_progress(self):
        """Share of the training done: 1, the full demand, in evaluation."""
        return self._state.progress.value if self._in_training else ops.ones(())

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        distances = self._nominal_constant * pairwise_distances(
            ops.convert_to_tensor(self.head.kernel)
        )
        self._state.update_state(distances, advance=training)
        self._in_training = training
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def fit(self, *args, **kwargs):
        """Trains, as `keras.Model.fit`, keeping count of the progress for the losses' ramps."""
        check_distribution()
        arguments = inspect.signature(super().fit).bind(*args, **kwargs)
        check_fit(**arguments.arguments)
        schedule = Schedule(self._state, self._cosine)
        callbacks = arguments.arguments.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks = callbacks.callbacks
        elif not isinstance(callbacks, (list, tuple)):
            callbacks = [] if callbacks is None else [callbacks]
        arguments.arguments["callbacks"] = [schedule, *callbacks]
        try:
            return super().fit(*arguments.args, **arguments.kwargs)
        finally:
            schedule.finish()

    def evaluate(self, *args, **kwargs):
        """Evaluates, as `keras.Model.evaluate`; first checks that batches fit the devices."""
        return self._checked(super().evaluate, *args, **kwargs)

    def predict(self, *args, **kwargs):
        """Predicts, as `keras.Model.predict`; first checks that batches fit the devices."""
        return self._checked(super().predict, *args, **kwargs)

    @staticmethod
    def _checked(method, *args, **kwargs):
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        check_batches(given.get("x"), given.get("batch_size"), given.get("steps"))
        return method(*args, **kwargs)

    def get_compile_config(self):
        # Keras saves what "auto" became here: a model from JAX would ask PyTorch for torch.compile.
        config = super().get_compile_config()
        return {**config, "jit_compile": self._requested_jit} if config else config

    def compile_from_config(self, config):
        cosine = self._cosine
        self.compile(**keras.saving.deserialize_keras_object(config))
        self._cosine = cosine
        if self.built:
            self.optimizer.build(self.trainable_variables)
