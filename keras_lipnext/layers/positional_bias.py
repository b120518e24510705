from typing import Any

import keras

from keras_lipnext.arguments import resolve_data_format, title
from keras_lipnext.layers.images import image_sizes, spatial_axes
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
        Images of rank 4 of known height and width.

    Output shape:
        The input's.

    Raises:
        ValueError: for another rank or an unknown height or width.

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
        height, width, _ = image_sizes(self, input_shape)
        if height is None or width is None:
            raise ValueError(
                f"{title(self)} holds one value a position and needs a known "
                f"height and width. Received: input_shape={tuple(input_shape)}"
            )
        last = self.data_format == "channels_last"
        shape = (height, width, 1) if last else (1, height, width)
        self.bias = add_bias(self, shape, self.initializer)
        sizes = dict(zip(spatial_axes(self.data_format), (height, width)))
        self.input_spec = keras.layers.InputSpec(ndim=4, axes=sizes)

    def call(self, inputs: Tensor) -> Tensor:
        return inputs + self.bias

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
            "data_format": self.data_format,
        }
