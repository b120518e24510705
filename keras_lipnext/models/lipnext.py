import contextlib
import dataclasses
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any, Self

import keras

from keras_lipnext import backend, layers
from keras_lipnext.distribution import check_distribution, lipnext_layout_map
from keras_lipnext.models import necks
from keras_lipnext.models.architecture import LipNeXtArchitecture
from keras_lipnext.models.built import BuiltModel
from keras_lipnext.models.certifiable import reject_unknown
from keras_lipnext.models.estimate import Estimate, estimate
from keras_lipnext.optimizers import ManifoldMuon, cosine
from keras_lipnext.typing import Config, DType

# Chosen on held-out training images (benchmarks/tune.py, results/tuning.jsonl).
ANGLE = 0.04  # radians by which the matrices of sqrt(depth) blocks together turn in a step
EUCLIDEAN_SHARE = 1 / 2  # Adam's rate for biases and the head, as a share of a block's angle


@keras.saving.register_keras_serializable("keras_lipnext")
class LipNeXt(BuiltModel):
    """LipNeXt classifier: a 1-Lipschitz network of orthogonal matrices and spatial shifts.

    image - 1/2 -> PatchEmbedding -> depth x LipNeXtBlock -> neck -> NormalizedDense -> logits

    In place of images it takes series (length, channels) and volumes (depth, height, width,
    channels), each of whose axes has two directions of shifts.

    The neck is L2Pool, the paper's form, or, with neck="patches",

        patches of the feature map, flattened -> OrthogonalDense -> BetaAbs -> flattened
        -> dense_depth x (OrthogonalDense -> BetaAbs)

    which keeps the sign and the place of features, where pooling forgets both, for more weights:
    docs/guides/sizes.md has figures and CPU seconds of both, of benchmarks/ablations.py.

    With output="dense" there are logits for each position of the input, for masks: of patches of
    p x p pixels, the neck is then the inverse of the stem,

        OrthogonalDense to p^2 neck_width units -> BetaAbs -> p x p pixels of neck_width numbers
        -> dense_depth x (OrthogonalDense -> BetaAbs) at each pixel

    and the labels that `fit` takes are integers, shape (batch, height, width).

    It comes compiled: ManifoldMuon with a cosine decay over each `fit`, the EMMA loss with its
    ramp, accuracy and certified accuracy as metrics.

    Example:

    ```python
    model = keras_lipnext.LipNeXt(size="tiny", input_shape=(8, 8, 1), num_classes=10)
    model.fit(x_train, y_train, epochs=30, validation_data=(x_val, y_val))
    print(model.certify(x_test, y_test, epsilons=(0.1, 0.25)))
    ```

    | size | depth | width | ratio | weights in the blocks' matrices | the paper counts |
    | --- | ---: | ---: | ---: | ---: | ---: |
    | tiny | 8 | 64 | 1/8 | 49 k | 66 k |
    | small | 8 | 256 | 1/16 | 655 k | 1.05 M |
    | base | 32 | 1024 | 1/16 | 41.9 M | 67.1 M |
    | large | 32 | 2048 | 1/16 | 168 M | 268 M |
    | 1b | 32 | 4096 | 1/16 | 671 M | 1.07 B |
    | 2b | 64 | 4096 | 1/16 | 1.34 B | 2.15 B |

    Args:
        size: One of the sizes above; "tiny" if neither `depth` nor `width` is given either.
        input_shape: (height, width, channels) of images, (length, channels) of series or (depth,
            height, width, channels) of volumes; channels first if so configured. Values in [0, 1].
        num_classes: Number of classes, at least 2.
        patch_size: Side of a patch in pixels. None takes the smallest divisor >= 2 of the images'
            sides that leaves at most 14 x 14 patches, of series 32, of volumes 7 x 7 x 7, and with
            output="dense" four times as many along each axis; if `width` channels cannot hold
            such patches, the largest they can hold.
        depth: Number of blocks; overrides the size's.
        width: Number of channels; overrides the size's.
        shift_ratio: Share of the channels that a block shifts in each direction, two along each
            axis of the input; overrides the size's.
        beta: Share of the channels that the activation rectifies.
        padding: Of the shifts, "circular" or "zero".
        mixing: "reduced" stores and multiplies with the rows of R that the shift moves, "full" is
            the paper's form, with the whole R: the same functions, at the cost of more products and
            weights. See `reduced`.
        output: "classes", logits of the whole input, shape (batch, classes), or "dense", of each of
            its positions, shape (batch, height, width, classes) for images: classes last, whatever
            the data format.
        neck: "pool", L2 pooling, or "patches"; see above. None is "patches", but "pool" for the
            sizes base, large, 1b and 2b, which are the paper's; with output="dense", which has
            neither, None is all there is.
        neck_width: Units of each OrthogonalDense of the neck. None is 2 * width for "patches", at
            most 2048, and width for the dense layers behind "pool"; with output="dense", where it
            counts the numbers of a pixel, the larger of num_classes and what keeps all width
            numbers of a patch.
        neck_patch_size: Side of the patches of "patches", in positions of the feature map, whose
            height and width it divides. None takes the side with the fewest weights: with 2 *
            width units, 4 for a map of 8 x 8 or 16 x 16, 7 for 7 x 7 or 14 x 14.
        dense_depth: Number of OrthogonalDense -> BetaAbs on the vector in front of the head, 0 or
            more. None is 1 for "patches", and 0 for "pool", the paper's, and output="dense".
        epsilon: l2 radius of interest, in units of the inputs: certified accuracy at `epsilon` is
            shown in training, and EMMA demands margins up to 3 * epsilon, as the paper does.
        temperature: EMMA's temperature. Higher favours clean accuracy, lower large radii. None is
            128 / sqrt(height * width), and at least 1, the paper's; the root is of the number of
            positions of a series or volume, and with output="dense" of one.
        learning_rate: ManifoldMuon's learning rate, a float: the angle in radians by which a matrix
            turns in a step. None is 0.04 / sqrt(depth), whatever the width. Adam trains biases and
            the head at half of it. Each `fit` multiplies both by a factor that falls from 1 to
            0 along a cosine, step by step (`keras_lipnext.optimizers.cosine`); compile the model
            yourself for another schedule.
        remat: Whether to keep of each block only its input for the backward pass, and compute it
            anew there: less memory for more time (`benchmarks/memory.py`). The same function and,
            up to rounding, gradients.
        data_format: "channels_last", "channels_first" or None (`keras.config.image_data_format()`).
        dtype: Dtype policy of the layers, e.g. "mixed_bfloat16". None is the global policy. The
            pooling and the head stay in float32 under a mixed one.
        compile: Whether to compile the model with these defaults.
        name: Name of the model.

    Raises:
        ValueError: for an unknown size, or shapes that cannot work, as the layers say.

    Reference:
        LipNeXt (Hu, Hu, Fredrikson, ICLR 2026), arXiv 2601.18513.
    """

    _architecture: LipNeXtArchitecture

    def __init__(
        self,
        size: str | None = None,
        input_shape: tuple[int, ...] | None = None,
        num_classes: int = 1000,
        patch_size: int | None = None,
        depth: int | None = None,
        width: int | None = None,
        shift_ratio: float | None = None,
        beta: float = 0.75,
        padding: str = "circular",
        mixing: str = "reduced",
        output: str = "classes",
        neck: str | None = None,
        neck_width: int | None = None,
        neck_patch_size: int | None = None,
        dense_depth: int | None = None,
        epsilon: float = 36 / 255,
        temperature: float | None = None,
        learning_rate: float | None = None,
        remat: bool = False,
        data_format: str | None = None,
        dtype: DType = None,
        compile: bool = True,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        reject_unknown(self, kwargs, ("trainable",))
        architecture = LipNeXtArchitecture(
            size=size,
            input_shape=input_shape,
            num_classes=num_classes,
            patch_size=patch_size,
            depth=depth,
            width=width,
            shift_ratio=shift_ratio,
            beta=beta,
            padding=padding,
            mixing=mixing,
            output=output,
            neck=neck,
            neck_width=neck_width,
            neck_patch_size=neck_patch_size,
            dense_depth=dense_depth,
            epsilon=epsilon,
            temperature=temperature,
            learning_rate=learning_rate,
            remat=remat,
            data_format=data_format,
            dtype=dtype,
        )
        if remat and keras.backend.backend() == "jax" and backend.on_cpu():
            # A warning: a model that was trained on an accelerator must load.
            warnings.warn(
                "`remat=True` saves nothing on JAX's CPU backend: XLA merges what is computed anew "
                "with what was computed before. On CPUs it saves memory with "
                "KERAS_BACKEND=tensorflow or torch.",
                stacklevel=2,
            )
        depth, width, policy = architecture.depth, architecture.width, architecture.dtype
        patch_size, shift_ratio = architecture.patch_size, architecture.shift_ratio
        moving = 2 * len(architecture.map) * round(shift_ratio * width)
        mixed = moving if mixing == "reduced" else width
        check_distribution(
            {
                "patch_embedding/kernel": (architecture.entries, width),
                "block_0/mixing/kernel": (width, mixed),
                "block_0/dense/kernel": (width, width),
                **{f"{k}/kernel": shape for k, (shape, _) in necks.kernels(architecture).items()},
            }
        )
        shared: dict[str, Any] = {"data_format": architecture.data_format, "dtype": policy}

        inputs = keras.Input(architecture.input_shape, name="image")
        x = keras.layers.Rescaling(1.0, offset=-0.5, dtype=policy, name="centre")(inputs)
        x = layers.PatchEmbedding(patch_size, width, name="patch_embedding", **shared)(x)
        blocks = [f"block_{index}" for index in range(depth)]
        # By name: a scope of mode "full" would recompute a block's parts each by itself as well.
        scope = keras.RematScope("list_of_layers", layer_names=blocks)
        with scope if remat else contextlib.nullcontext():
            for block in blocks:
                x = layers.LipNeXtBlock(shift_ratio, beta, padding, mixing, name=block, **shared)(x)
        x = necks.neck(x, architecture)
        outputs = layers.NormalizedDense(num_classes, dtype=policy, name="head")(x)
        super().__init__(inputs, outputs, name=name, **kwargs)

        self._architecture = architecture
        if compile:
            self.compile_as_built()

    def compile_as_built(self) -> None:
        rate = self._architecture.learning_rate
        rate = float(ANGLE / math.sqrt(self._architecture.depth) if rate is None else rate)
        optimizer = ManifoldMuon(
            rate, euclidean_learning_rate=EUCLIDEAN_SHARE * rate, schedule=cosine()
        )
        self._architecture.compile(self, optimizer)

    def reduced(self) -> Self:
        """This model with `mixing="reduced"`: the same function up to rounding, cheaper.

        Weights are carried over exactly, of each whole R the rows that move. What was frozen stays
        so. How the model was compiled, and its optimizer's state, are not carried over: moments of
        the rows that stay have no counterpart. Compile it to train on.

        Returns:
            `LipNeXt`, not compiled.
        """
        model = type(self).from_config({**self.get_config(), "mixing": "reduced"})
        for target, source in zip(model.weights, self.weights, strict=True):
            # Of kernel = R^T the columns that move come first; other weights keep all of theirs.
            values = keras.ops.convert_to_tensor(source)[..., : target.shape[-1]]
            # A copy: on JAX training gives away the buffers of a model's own weights.
            target.assign(keras.ops.copy(values))
        return model

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> Self:
        # Files from before there were necks have pooling, whatever the default is now.
        return super().from_config({"neck": "pool", **config}, custom_objects)

    @classmethod
    def estimate(
        cls,
        size: str | None = None,
        batch: int = 1,
        devices: int = 1,
        dtype: DType = None,
        **arguments: Any,
    ) -> Estimate:
        """What training takes, from formulas: no model is built, nothing allocated.

        Example:

        ```python
        print(keras_lipnext.LipNeXt.estimate("1b", batch=256, devices=8, dtype="mixed_bfloat16"))
        ```

        Args:
            size: As for the model.
            batch: Number of images of a step, on all devices together.
            devices: Number of devices, each with a copy of the model and an equal share of the
                batch, as under `keras.distribution.DataParallel`.
            dtype: Dtype policy, or its name. None is the global policy.
            **arguments: As for the model, `input_shape`, `depth`, `mixing`, `remat` and so on.

        Returns:
            `keras_lipnext.models.Estimate`; `print` shows it as a table. Its formulas are in
            keras_lipnext/models/estimate.py.

        Raises:
            ValueError: as for the model, and if the batch does not divide among the devices.
        """
        signature = inspect.signature(cls)
        reject_unknown(cls, arguments, signature.parameters)
        full = signature.bind(size=size, dtype=dtype, **arguments)
        full.apply_defaults()
        names = [field.name for field in dataclasses.fields(LipNeXtArchitecture) if field.init]
        architecture = LipNeXtArchitecture(**{name: full.arguments[name] for name in names})
        return estimate(batch, devices, architecture)

    get_layout_map = staticmethod(lipnext_layout_map)

    def _parts(self):
        blocks = [layer for layer in self.layers if isinstance(layer, layers.LipNeXtBlock)]
        inside = {f"{block.name}/{part.name}": part for block in blocks for part in block.parts}
        return super()._parts() | inside
