"""Functions of tensors compiled, or traced, as one program."""

import functools

import keras

from keras_lipnext.backend import precision
from keras_lipnext.backend.core import value


def compiled(function, variables):
    """`function` of one tensor, compiled where the backend compiles: JAX and TensorFlow.

    Args:
        function: Function of one tensor that reads no other state than `variables`.
        variables: List of Keras variables; their values are read anew at each call.
    """
    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def pure(values, x):
            # As an argument a weight is not copied into the program as a constant.
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return function(x)

        return lambda x: pure([v.value for v in variables], x)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, autograph=False)  # as Keras compiles models
    return function


def one_program(function):
    """`function`, traced once for the shapes and dtypes of its arguments, whoever calls it.

    JAX compiles it as a whole, not operation by operation, and a step that calls it for each of its
    stacks, or in a second `fit`, does not trace it again; nor does TensorFlow. PyTorch, and
    TensorFlow where it computes at once, run it as it is.

    Args:
        function: Pure function. Its positional arguments are tensors, variables or None, its
            keyword arguments hashable settings. What it does may depend on the device as
            `backend.matmul` does.
    """

    @functools.wraps(function)
    def wrapper(*tensors, **settings):
        if keras.backend.backend() == "torch" or not _traces():
            return function(*tensors, **settings)
        program = _program(function, precision.ways(), tuple(settings.items()))
        return program(*map(value, tensors))

    return wrapper


def one_of(measure, cheap, general):
    """`general(*operands)` of `enough, *operands = measure(x)`, or `cheap` where that is enough.

    A program that is traced takes `general`, which is to cost no more there then. At once, JAX
    compiles the general one, a loop and a decomposition, only where it is needed; the cheap one
    along with what measures.

    Args:
        measure: Pure function of a tensor. Its first value says whether `cheap` is enough.
        cheap, general: Pure functions of the others.
    """

    @one_program
    def traced(x):
        return general(*measure(x)[1:])

    @one_program
    def tried(x):
        enough, *operands = measure(x)
        return enough, cheap(*operands), operands

    thorough = one_program(general)

    @functools.wraps(measure)
    def wrapper(x):
        if not _is_known(x):
            return traced(x)
        if keras.backend.backend() != "jax":
            enough, *operands = measure(x)
            return (cheap if enough else general)(*operands)
        enough, answer, operands = tried(x)
        if not _is_known(enough):  # `x` is a constant of a program that is being traced
            return traced(x)
        return answer if enough else thorough(*operands)

    return wrapper


def _is_known(x):
    """Whether a tensor has its value, all of it in this process."""
    if keras.backend.backend() == "jax":
        import jax

        return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable
    return keras.backend.backend() == "torch" or not _traces()


def _traces():
    if keras.backend.backend() == "jax":
        return True
    import tensorflow as tf

    return tf.inside_function()


@functools.lru_cache(maxsize=1024)
def _program(function, ways, settings):
    # `ways`: of the device, for which the function is traced.
    def named(*tensors):
        return function(*tensors, **dict(settings))

    named.__name__ = function.__name__
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(named)
    import tensorflow as tf

    return tf.function(named, autograph=False)
