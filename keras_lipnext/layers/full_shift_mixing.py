import keras
from keras import ops

from keras_lipnext.arguments import title
from keras_lipnext.layers.images import channel_axis, matmul
from keras_lipnext.layers.shift_mixing import ShiftMixing
from keras_lipnext.layers.spatial_shift import shift_groups
from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.typing import Tensor


@keras.saving.register_keras_serializable(NAMESPACE)
class FullShiftMixing(ShiftMixing):
    """Spatial shift in a learned orthogonal basis as the paper writes it, `R^T S R`.

    It stores the whole orthogonal R, `kernel = R^T` of shape (channels, channels), and computes
    both products with it. `ShiftMixing` is the same family of functions from the rows of R that
    move, with `8 * ratio` instead of 2 products of that size: use that one. This one is the
    reference it is tested and measured against, and takes in weights of models in the paper's form.

    Example:

    ```python
    layer = keras_lipnext.layers.FullShiftMixing(ratio=1 / 8)
    layer(np.ones((1, 4, 4, 16))).shape  # (1, 4, 4, 16)
    layer.reduced()  # the ShiftMixing that computes the same
    ```

    Args:
        ratio: Share of the channels that moves in each direction, of which each spatial axis has
            two: in (0, 1/2] for series, (0, 1/4] for images, (0, 1/6] for volumes.
        padding: "circular" or "zero".
        kernel_initializer: Keras initializer, whose draw is projected on the manifold. None draws
            a random orthogonal matrix.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).

    Input shape:
        Series (batch, length, channels), images (batch, height, width, channels) or volumes (batch,
        depth, height, width, channels), or channels first; batch and spatial sizes may be None.

    Output shape:
        The input's.

    Raises:
        ValueError: for another rank, ratio, padding, or channels the groups do not divide.

    Reference:
        The block's `R^T S R`: LipNeXt (Hu et al., ICLR 2026), arXiv 2601.18513.
    """

    def _kernel_shape(self, channels: int) -> tuple[int, int]:
        return channels, channels

    def call(self, inputs: Tensor) -> Tensor:
        axis = channel_axis(self.data_format)
        kernel = ops.convert_to_tensor(self.kernel)
        rotated = matmul(inputs, kernel, axis)
        shifted = shift_groups(rotated, self.moving, self.padding, self.data_format)
        return matmul(shifted, ops.transpose(kernel), axis)

    def reduced(self) -> ShiftMixing:
        """The `ShiftMixing` that computes the same: built, with the columns that move, exactly.

        The two functions differ by what R^T R differs from the identity, and by rounding.

        Returns:
            `ShiftMixing` of the same configuration and name.

        Raises:
            ValueError: if the layer has no weights yet.
        """
        if not self.built:
            raise ValueError(
                f"{title(self)} has no weights to carry over: call it on a batch, or build it, "
                "before `reduced()`."
            )
        layer = ShiftMixing.from_config(self.get_config())
        layer.build([self.input_spec.axes.get(axis) for axis in range(self.input_spec.ndim)])
        columns = ops.convert_to_tensor(self.kernel)[:, : layer.kernel.shape[1]]
        layer.kernel.assign(ops.copy(columns))  # JAX would share a slice of all columns
        return layer
