"""Float64 on every backend: the scope in which Keras keeps it, and a look at whether it did."""

import contextlib
import threading

import keras

from keras_lipnext.backend import keras_private

_LOWER = ("float32", "float16", "bfloat16")


class _Promotion(dict):
    """Keras' table of 64-bit types and what they become, which a thread may see otherwise.

    Keras looks each result's type up in one table of the whole process. Switching an entry would
    change what other threads train and predict in, and a thread that switches it back takes
    float64 away from the others. So the table itself never changes: a look-up asks whether its
    thread is inside `float64_scope`.
    """

    def __init__(self, table):
        super().__init__(table)
        self.thread = threading.local()

    def get(self, dtype, default=None):
        if dtype == "float64" and getattr(self.thread, "keeps_float64", False):
            return dtype
        return super().get(dtype, default)

    def __getitem__(self, dtype):
        kept = self.get(dtype)
        return super().__getitem__(dtype) if kept is None else kept


keras_private.set_promotion_table(_Promotion(keras_private.promotion_table()))


@contextlib.contextmanager
def float64_scope():
    """Context in which computations on float64 tensors stay in float64, on every backend.

    Two things stand in the way. JAX has no float64 unless its 64-bit mode is on. And on JAX and
    PyTorch Keras' dtype promotion turns 64-bit results into 32-bit ones: `keras.ops.matmul` of two
    float64 tensors computes in float32 on PyTorch, `tanh` on JAX. Both are lifted for the thread
    that enters the context, and for no other.

    Raises:
        RuntimeError: if the Keras installed would still promote float64 to something else.
    """
    with contextlib.ExitStack() as stack:
        if keras.backend.backend() == "jax":
            import jax

            if jax.default_backend() == "tpu":
                raise RuntimeError(
                    "TPUs have no IEEE float64 arithmetic: certificates need it. Set "
                    "JAX_PLATFORMS=cpu before starting Python."
                )
            stack.enter_context(jax.enable_x64(True))
            # A lower precision set for training would reach float64 products too.
            stack.enter_context(jax.default_matmul_precision("highest"))
        stack.enter_context(_promotion_kept())
        if keras.backend.result_type("float64", "float64") != "float64":
            raise RuntimeError(
                f"Keras {keras.__version__} computes float64 operations in lower precision on the "
                f"{keras.backend.backend()} backend: certificates cannot be evaluated."
            )
        yield


@contextlib.contextmanager
def _promotion_kept():
    thread = keras_private.promotion_table().thread
    kept_before = getattr(thread, "keeps_float64", False)
    thread.keeps_float64 = True
    try:
        yield
    finally:
        thread.keeps_float64 = kept_before


def call_in_float64(function, *args, **kwargs):
    """What `function` answers, and the first operation in it that loses float64.

    Args:
        function: Function of tensors of the backend, and of anything else.

    Returns:
        (answer, name): the name of the first operation that reads a float64 tensor and answers
        with one of fewer bits, on JAX and TensorFlow of a function that is being compiled as well
        as of others; None if there is none. Outside compilation TensorFlow shows nothing.
    """
    look = {"jax": _call_on_jax, "torch": _call_on_torch, "tensorflow": _call_on_tensorflow}
    return look[keras.backend.backend()](function, args, kwargs)


def _call_on_jax(function, args, kwargs):
    import jax

    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of_tensors(tensors):
        filled = dict(zip(places, tensors))
        filled = [filled.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, filled)
        return function(*args, **kwargs)

    program = jax.make_jaxpr(of_tensors)([leaves[i] for i in places])
    return function(*args, **kwargs), next(_lossy_equations(program.jaxpr), None)


def _lossy_equations(jaxpr):
    for equation in jaxpr.eqns:
        parts = [
            getattr(part, "jaxpr", part)
            for parameter in equation.params.values()
            for part in (parameter if isinstance(parameter, (tuple, list)) else (parameter,))
        ]
        parts = [part for part in parts if hasattr(part, "eqns")]
        for part in parts:
            yield from _lossy_equations(part)
        read, made = (
            {str(getattr(v.aval, "dtype", None)) for v in values}
            for values in (equation.invars, equation.outvars)
        )
        if not parts and "float64" in read and not made.isdisjoint(_LOWER):
            yield equation.primitive.name


def _call_on_torch(function, args, kwargs):
    from torch.utils._python_dispatch import TorchDispatchMode

    lossy = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            read, made = (
                {
                    str(getattr(v, "dtype", None)).removeprefix("torch.")
                    for v in keras.tree.flatten(t)
                }
                for t in ((args, kwargs or {}), result)
            )
            name = operation.overloadpacket.__name__
            # New tensors made after another's shape read none of its numbers.
            fresh = name.startswith("new_") or name.endswith("_like")
            if "float64" in read and not made.isdisjoint(_LOWER) and not fresh:
                lossy.append(name)
            return result

    with Watch():
        answer = function(*args, **kwargs)
    return answer, next(iter(lossy), None)


def _call_on_tensorflow(function, args, kwargs):
    import tensorflow as tf

    if tf.executing_eagerly():
        return function(*args, **kwargs), None
    graph = tf.compat.v1.get_default_graph()
    before = graph.version
    answer = function(*args, **kwargs)
    added = graph.as_graph_def(from_version=before)
    nodes = [*added.node, *(node for f in added.library.function for node in f.node_def)]
    lower = {tf.as_dtype(name).as_datatype_enum for name in _LOWER}
    lossy = (
        node.name
        for node in nodes
        if node.op == "Cast"  # no other operation turns floating point numbers into shorter ones
        and node.attr["SrcT"].type == tf.float64.as_datatype_enum
        and node.attr["DstT"].type in lower
    )
    return answer, next(lossy, None)
