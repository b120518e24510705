"""How a layer is called: what could make it compute something else than its class does."""

import inspect

import numpy as np


def unusual_arguments(operation, args, kwargs):
    """Arguments of a layer's call beside its tensors that can change what it computes."""
    # Keras notes the default of `training`, True for augmentation, as if it had been given;
    # `predict` overrides it.
    call = inspect.signature(type(operation).call).parameters
    default = call["training"].default if "training" in call else None
    harmless = {"training": (None, False, default), "mask": (None,)}
    named = {
        name: value
        for name, value in kwargs.items()
        if not any(value is default for default in harmless.get(name, (None,)))
    }
    return [*map(repr, args[1:]), *(f"{name}={value!r}" for name, value in named.items())]


def acts_by_default(layer):
    """Whether a call that does not name `training` counts as one of training: augmentation."""
    training = inspect.signature(type(layer).call).parameters.get("training")
    return training is not None and training.default is True


def replaced(operation):
    """Methods of the instance that are not those of its class: then the class says nothing."""
    return [
        name
        for name, value in vars(operation).items()
        if name not in ("build", "quantize")  # Keras wraps these two itself
        and callable(value)
        and inspect.isfunction(inspect.unwrap(getattr(type(operation), name, None) or len))
    ]


def plain_settings(layer):
    """Numbers and words among the attributes of a layer of someone else's.

    They may have been changed since the layer was made, which its configuration need not show.
    """
    return {
        name: np.float64(value) if type(value) is float else value
        for name, value in vars(layer).items()
        if isinstance(value, (bool, int, float, str))
        and not name.startswith("_")
        and name != "training"  # of PyTorch's modules: whether they are in training now
    }


def first_argument_positional(operation, args, kwargs):
    """`layer(inputs=x)` as `layer(x)`."""
    names = list(inspect.signature(type(operation).call).parameters)[1:]
    if args or not names or names[0] not in kwargs:
        return args, kwargs
    kwargs = dict(kwargs)
    return (kwargs.pop(names[0]),), kwargs
