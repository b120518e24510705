"""What the layers store: kernels on the Stiefel manifold, biases, and under which names."""

from collections.abc import Callable
from typing import Any

import keras

from keras_lipnext.manifolds.constraint import ProjectedInitializer, RandomStiefel, Stiefel
from keras_lipnext.typing import DType, Shape, Tensor

# Of every class in saved files, for ever.
NAMESPACE = "keras_lipnext"


def accumulating_dtype(dtype: DType) -> str:
    """Policy for layers that sum many terms: the policy's variable dtype, float32 when mixed.

    Under mixed_bfloat16 and mixed_float16 pooling and the head run, and answer, in float32.
    """
    return keras.dtype_policies.get(dtype or keras.config.dtype_policy()).variable_dtype


def add_stiefel_kernel(
    layer: keras.layers.Layer, shape: Shape, initializer: Callable[..., Tensor] | None
) -> keras.Variable:
    """Weight "kernel" that lives on the Stiefel manifold, random if no initializer is given."""
    return layer.add_weight(
        name="kernel",
        shape=shape,
        initializer=RandomStiefel() if initializer is None else ProjectedInitializer(initializer),
        constraint=Stiefel(),
        aggregation="mean",
    )


def add_bias(
    layer: keras.layers.Layer,
    shape: Shape,
    initializer: Callable[..., Tensor],
    autocast: bool = True,
) -> keras.Variable:
    return layer.add_weight(
        name="bias", shape=shape, initializer=initializer, aggregation="mean", autocast=autocast
    )


def serialize_optional(initializer: Any) -> Any:
    return None if initializer is None else keras.initializers.serialize(initializer)
