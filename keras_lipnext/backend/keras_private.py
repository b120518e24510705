"""Every private name of Keras that this package relies on, each with what it is relied on for.

No other file reads an underscore attribute of a Keras object or imports `keras.src`
(tests/test_structure.py). tests/test_keras_private.py holds Keras to each of these contracts, so
that a new version that changes one fails there, and not in a certificate.
"""

import keras
from keras.src.backend.common import dtypes
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.models.functional import Functional

# Methods of `keras.optimizers.Optimizer` that `ManifoldOptimizer` overrides, with their arguments.
# `apply` calls the first, once gradients are unscaled, and then projects by its constraint each
# variable left in the list it passed. The first calls the third, which asks the last of each
# variable, and then the second, with whole lists.
OPTIMIZER_HOOKS = {
    "_backend_apply_gradients": ("grads", "trainable_variables"),
    "_backend_update_step": ("grads", "trainable_variables", "learning_rate"),
    "_apply_weight_decay": ("variables",),
    "_use_weight_decay": ("variable",),
}

# What layers note of the shape that they were built with, as `Normalization` does: no settings.
BUILD_ATTRIBUTES = ("_build_input_shape",)

# The variable of a `keras.random.SeedGenerator` has this name, and no other variable has.
SEED_STATE = "seed_generator_state"


# --- graphs of functional models


def is_graph(model):
    """Whether the model computes what its graph of layers does: none of its calls is overridden.

    `keras.Model(inputs, outputs)` makes a `Functional`, the class whose `call` runs the graph.
    """
    return (
        type(model).call in (Functional.call, keras.Sequential.call)
        and type(model).__call__ in (Functional.__call__, keras.Sequential.__call__)
        and {"call", "__call__"}.isdisjoint(vars(model))
    )


def node_of(tensor):
    """The node that made a symbolic tensor: its operation, arguments, input and output tensors.

    `KerasTensor._keras_history` names the operation and the index of its call among
    `_inbound_nodes`.
    """
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index]


def input_structure(model):
    """Structure in which a functional model takes its inputs, `{"x": tensor}`; None of another."""
    return model._inputs_struct if isinstance(model, Functional) else None


def is_keras_layer(layer):
    """Whether the class of a layer is Keras' own: it is defined somewhere in `keras.src`."""
    return type(layer).__module__.startswith("keras.src.")


def is_keras_operation(operation):
    """Whether an operation is one of `keras.ops`, by the modules of Keras that define them."""
    return type(operation).__module__.startswith(("keras.src.ops.", "keras.src.activations."))


def layers_within(layer):
    """A layer and all layers inside it, at any depth: `Layer._flatten_layers()`."""
    return list(layer._flatten_layers())


# --- variables


def held_value(variable):
    """What a variable holds outside of any scope: a tensor or raw variable of the backend, or None.

    `Variable._value`. None on JAX while it is given to a step, which donates it.
    """
    return variable._value


def hold(variable, value):
    """Sets what `held_value` answers, without a look at shape or scope."""
    variable._value = value


def scope_value(variable):
    """What the `keras.StatelessScope` that is entered has for a variable; None without either."""
    return get_stateless_scope().get_current_value(variable) if in_stateless_scope() else None


def in_scope():
    """Whether a `keras.StatelessScope` is entered in this thread."""
    return in_stateless_scope()


def layout_of(variable):
    """Where `keras.distribution` lays a variable, as its backend says it; or None.

    `Variable._layout`: in Keras 3.14 that itself, and on JAX only, later a `TensorLayout` that has
    it as `backend_layout`. None for what is no variable of Keras.
    """
    layout = getattr(variable, "_layout", None) if isinstance(variable, keras.Variable) else None
    return getattr(layout, "backend_layout", layout)


# --- dtype promotion


def promotion_table():
    """Keras' table of 64-bit dtypes and what results of them become, {"float64": "float32", ...}.

    `result_type` looks each result up in `dtypes.BIT64_TO_BIT32_DTYPE`, by `get` or by index, on
    PyTorch and on JAX.
    """
    return dtypes.BIT64_TO_BIT32_DTYPE


def set_promotion_table(table):
    """Has Keras look up in this table from now on."""
    dtypes.BIT64_TO_BIT32_DTYPE = table


# --- optimizers


def variable_index(optimizer, variable):
    """Position among the variables that `build` was given, also of a raw `tf.Variable`."""
    return optimizer._get_variable_index(variable)


def variable_key(optimizer, variable):
    """What the optimizer knows a variable by, or the raw `tf.Variable` that it is handed for it."""
    return optimizer._var_key(variable)


def batches_seen(optimizer):
    """Variable that counts batches; `iterations` counts updates where gradients accumulate."""
    return optimizer._iterations


# --- training


def make_state(model, iterator=None, batch=None):
    """Makes the variables of a compiled model's optimizer and metrics, on TensorFlow.

    `Trainer._symbolic_build` does, for a batch like the given one, or like those that
    `TFEpochIterator._distributed_dataset` has, of which none is taken. A data set of unknown rank,
    or of other types than tensors, is left alone.
    """
    import tensorflow as tf

    if model.run_eagerly:  # nothing is traced, and losses may look at numbers
        return
    if batch is not None:
        model._symbolic_build(data_batch=batch)
        return
    dataset = iterator._distributed_dataset
    specs = keras.tree.flatten(getattr(dataset, "element_spec", None))
    if all(isinstance(s, tf.TensorSpec) and s.shape.rank is not None for s in specs):
        batch = keras.tree.map_structure(
            lambda s: keras.KerasTensor(tuple(s.shape), keras.backend.standardize_dtype(s.dtype)),
            dataset.element_spec,
        )
        model._symbolic_build(data_batch=batch)


# --- callbacks


def initial_epoch(model):
    """Number of epochs done before the one in which `fit` begins: `Model._initial_epoch`, or 0."""
    return model._initial_epoch or 0


def set_initial_epoch(model, epoch):
    """Has `fit` begin with this epoch, if called while training begins."""
    model._initial_epoch = epoch


def backup_files(callback):
    """((weights, metadata) of the latest backup, those of the one before) of BackupAndRestore."""
    return (
        (callback._weights_path, callback._training_metadata_path),
        (callback._prev_weights_path, callback._prev_training_metadata_path),
    )
