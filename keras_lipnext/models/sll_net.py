import dataclasses
from typing import Any

import keras

from keras_lipnext import layers
from keras_lipnext.arguments import positive_integer
from keras_lipnext.layers.images import channel_axis
from keras_lipnext.models.architecture import Architecture, with_sizes
from keras_lipnext.models.built import BuiltModel
from keras_lipnext.models.certifiable import reject_unknown
from keras_lipnext.models.sizes import SLL_SIZES
from keras_lipnext.optimizers import ManifoldAdam, cosine
from keras_lipnext.typing import Activation, DType

LEARNING_RATE = 3e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLLArchitecture(Architecture):
    """What `SLLNet` documents; the sizes are numbers here."""

    depth: Any
    width: Any
    hidden_filters: Any
    dense_depth: Any
    hidden_units: Any
    kernel_size: Any
    pool_size: int
    bound: str
    activation: Any

    def __post_init__(self):
        super().__post_init__()
        size = "tiny" if self.size is None else self.size
        if size not in SLL_SIZES:
            raise ValueError(
                f"`size` must be one of {', '.join(SLL_SIZES)}. Received: size={size!r}"
            )
        preset = SLL_SIZES[size]
        sizes = with_sizes(preset, {name: getattr(self, name) for name in preset})
        sizes["pool_size"] = self.pool_size
        self._resolve(**{name: positive_integer(name, value) for name, value in sizes.items()})
        height, breadth, channels = self.image
        if height % self.pool_size or breadth % self.pool_size:
            raise ValueError(
                "`pool_size` must divide the images' height and width. Received: "
                f"pool_size={self.pool_size}, input_shape={self.input_shape}"
            )
        if self.width < channels:
            raise ValueError(
                f"`width` must be at least the images' number of channels, {channels}. Received: "
                f"width={self.width}"
            )


@keras.saving.register_keras_serializable("keras_lipnext")
class SLLNet(BuiltModel):
    """SLL network: residual SDP-based Lipschitz layers, convolutional, then dense.

    image - 1/2 -> zero channels up to `width` -> depth x SDPResidualConv2D -> average pooling,
    scaled to norm 1 -> flatten -> dense_depth x SDPResidualDense -> NormalizedDense -> logits

    It comes compiled, as `LipNeXt`: Adam with a cosine decay over each `fit`, the EMMA loss with
    its ramp, accuracy and certified accuracy as metrics.

    Example:

    ```python
    model = keras_lipnext.SLLNet(size="tiny", input_shape=(8, 8, 1), num_classes=10)
    model.fit(x_train, y_train, epochs=30, validation_data=(x_val, y_val))
    print(model.certify(x_test, y_test))
    ```

    | size | depth | width | hidden_filters | dense_depth | hidden_units |
    | --- | ---: | ---: | ---: | ---: | ---: |
    | tiny | 4 | 16 | 16 | 2 | 64 |
    | small | 20 | 45 | 5 | 7 | 2048 |
    | medium | 30 | 60 | 5 | 10 | 2048 |
    | large | 50 | 90 | 5 | 10 | 2048 |
    | xlarge | 70 | 120 | 5 | 15 | 2048 |

    Sizes but "tiny" are those of the paper's code.

    Args:
        size: One of the sizes above; "tiny" if None.
        input_shape: (height, width, channels) of the images, channels first if so configured.
            Values in [0, 1]. `pool_size` must divide height and width.
        num_classes: Number of classes, at least 2.
        depth: Number of convolutions; overrides the size's, as the next four.
        width: Number of channels.
        hidden_filters: Hidden channels of a convolution.
        dense_depth: Number of dense layers.
        hidden_units: Hidden units of a dense layer.
        kernel_size: Of the convolutions.
        pool_size: Side of the pooling's windows.
        bound: "sll", "spectral" (CPL) or "aol"; see `layers.SDPResidualConv2D`.
        activation: Keras activation with slopes in [0, 1].
        epsilon: l2 radius of interest; EMMA demands margins up to 3 * epsilon.
        temperature: EMMA's. None is 128 / sqrt(height * width), and at least 1.
        learning_rate: Adam's, 0.003 if None.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).
        dtype: Dtype policy of the layers. None is the global policy.
        compile: Whether to compile the model with these defaults.
        name: Name of the model.

    Raises:
        ValueError: for an unknown size, or shapes that cannot work.

    Reference:
        Araujo et al. (ICLR 2023), arXiv 2303.03169.
    """

    def __init__(
        self,
        size: str | None = None,
        input_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        depth: int | None = None,
        width: int | None = None,
        hidden_filters: int | None = None,
        dense_depth: int | None = None,
        hidden_units: int | None = None,
        kernel_size: int | tuple[int, int] = 3,
        pool_size: int = 4,
        bound: str = "sll",
        activation: Activation = "relu",
        epsilon: float = 36 / 255,
        temperature: float | None = None,
        learning_rate: float | None = None,
        data_format: str | None = None,
        dtype: DType = None,
        compile: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        reject_unknown(self, kwargs, ("trainable",))
        architecture = SLLArchitecture(
            size=size,
            input_shape=input_shape,
            num_classes=num_classes,
            depth=depth,
            width=width,
            hidden_filters=hidden_filters,
            dense_depth=dense_depth,
            hidden_units=hidden_units,
            kernel_size=kernel_size,
            pool_size=pool_size,
            bound=bound,
            activation=activation,
            epsilon=epsilon,
            temperature=temperature,
            learning_rate=learning_rate,
            data_format=data_format,
            dtype=dtype,
        )
        policy, data_format = architecture.dtype, architecture.data_format
        shared: dict[str, Any] = {"bound": bound, "activation": activation, "dtype": policy}

        inputs = keras.Input(architecture.input_shape, name="image")
        x = keras.layers.Rescaling(1.0, offset=-0.5, dtype=policy, name="centre")(inputs)
        padding = [(0, 0)] * 4
        padding[channel_axis(data_format)] = (0, architecture.width - architecture.image[-1])
        x = keras.ops.pad(x, padding)
        for index in range(architecture.depth):
            x = layers.SDPResidualConv2D(
                architecture.hidden_filters,
                kernel_size,
                data_format=data_format,
                name=f"convolution_{index}",
                **shared,
            )(x)
        # The mean of p x p entries has norm 1 / p.
        pool = keras.layers.AveragePooling2D(pool_size, data_format=data_format, dtype=policy)
        x = keras.layers.Rescaling(float(pool_size), dtype=policy)(pool(x))
        x = keras.layers.Flatten(data_format=data_format, dtype=policy)(x)
        for index in range(architecture.dense_depth):
            units = architecture.hidden_units
            x = layers.SDPResidualDense(units, name=f"dense_{index}", **shared)(x)
        outputs = layers.NormalizedDense(num_classes, dtype=policy, name="head")(x)
        super().__init__(inputs, outputs, name=name, **kwargs)

        self._architecture = architecture
        if compile:
            self.compile_as_built()

    def compile_as_built(self) -> None:
        rate = self._architecture.learning_rate or LEARNING_RATE
        self._architecture.compile(self, ManifoldAdam(rate, schedule=cosine()))
