from typing import Any

import keras

from keras_lipnext.arguments import resolve_data_format, title
from keras_lipnext.layers.images import SPATIAL, channels_along, sides_of, spatial_axes
from keras_lipnext.layers.weights import NAMESPACE, add_bias
from keras_lipnext.typing import Config, Initializer, Shape, Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class PositionalBias(keras.layers.Layer):
    """Adds one learned value to each position, shared by the channels.

    Circular shifts and channel mixing carry no position; this layer brings it in. An isometry.

    Example:

    ```python
    keras_lipnext.layers.PositionalBias()(np.ones((1, 4, 4, 16))).shape  # (1, 4, 4, 16)
    ```

    Args:
        initializer: Keras initializer of the bias.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Series, images or volumes, of rank 3, 4 or 5, of known spatial sizes; the batch's may be
        None.

    Output shape:
        The input's.

    Raises:
        ValueError: for another rank or an unknown spatial size.

    Reference:
        LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513.
    """

    def __init__(
        self, initializer: Initializer = "zeros", data_format: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.initializer = keras.initializers.get(initializer)
        self.data_format = resolve_data_format(data_format)

    def build(self, input_shape: Shape) -> None:
        sides, rank = sides_of(self, input_shape), len(input_shape)
        if None in sides:
            raise ValueError(
                f"{title(self)} holds one value a position and needs a known "
                f"{' and '.join(SPATIAL[len(sides)])}. Received: input_shape={tuple(input_shape)}"
            )
        channels_along(self, input_shape)
        last = self.data_format == "channels_last"
        shape = (*sides, 1) if last else (1, *sides)
        self.bias = add_bias(self, shape, self.initializer, autocast=False)
        sizes = dict(zip(spatial_axes(self.data_format, rank), sides))
        self.input_spec = keras.layers.InputSpec(ndim=rank, axes=sizes)

    def call(self, inputs: Tensor) -> Tensor:
        # One value for each sample before it is cast: so the gradient sums over channels first,
        # and then over samples. XLA on GPUs takes both at once only in a layout that has samples
        # beside channels, into which it would bring the activations of the whole block and back.
        bias = keras.ops.convert_to_tensor(self.bias)
        samples = keras.ops.broadcast_to(bias, (keras.ops.shape(inputs)[0], *bias.shape))
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        dtype = keras.backend.result_type(dtype, self.compute_dtype)
        return keras.ops.add(inputs, keras.ops.cast(samples, dtype))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
            "data_format": self.data_format,
        }
