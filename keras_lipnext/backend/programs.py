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


def one_of(measure, branches):
    """`branches[i](*operands)` of `i, *operands = measure(x)`: a switch where a program is traced.

    Outside, JAX compiles what measures and the branch that is taken, and none that is not: those
    for what is far off, a loop and a decomposition, take most of the time.

    Args:
        measure: Pure function of a tensor. Its first value is an integer.
        branches: List of pure functions of the others.
    """

    @one_program
    def switched(x):
        branch, *operands = measure(x)
        return keras.ops.switch(branch, branches, *operands)

    measured, programs = one_program(measure), list(map(one_program, branches))

    @functools.wraps(measure)
    def wrapper(x):
        if not _is_known_to_jax(x):
            return switched(x)
        branch, *operands = measured(x)
        if not _is_known_to_jax(branch):  # `x` is a constant of a program that is being traced
            return switched(x)
        return programs[int(branch)](*operands)

    return wrapper


def _is_known_to_jax(x):
    """Whether a JAX array has its value, all of it in this process."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return not isinstance(x, jax.core.Tracer) and x.is_fully_addressable


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
