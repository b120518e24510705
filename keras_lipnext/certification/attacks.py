"""Attacks, to check certificates empirically: PGD, and a bridge to the attack libraries.

They prove nothing.
"""

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_lipnext import backend
from keras_lipnext.twin import Float64Twin


def pgd(
    model: keras.Model,
    x: npt.ArrayLike,
    labels: npt.ArrayLike,
    radii: npt.ArrayLike,
    steps: int = 20,
    step_size: float = 0.25,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """l2 PGD that tries to change each prediction within its own radius, in float64.

    Maximises the best other logit minus the label's, by normalised gradient steps projected on the
    ball, from a random start. Inputs are not clipped to [0, 1]: certificates do not need it.

    Example:

    ```python
    certificate = keras_lipnext.certify(model, x)
    flipped, attacked = keras_lipnext.certification.pgd(
        model, x, certificate.predictions, 0.999 * certificate.radii
    )
    assert not flipped.any()
    ```

    Args:
        model: Model that `certify` accepts.
        x: Array of inputs.
        labels: Integers, shape (n,): the class to leave, e.g. the predictions.
        radii: Floats, shape (n,): radius of each sample's ball.
        steps: Gradient steps.
        step_size: Step, as a share of the radius.
        seed: Integer seed of the random starts.

    Returns:
        (flipped, adversarial): booleans, shape (n,), whether the prediction left `labels`, and the
        attacked inputs, float64.
    """
    x = np.asarray(x, "float64")
    labels = np.asarray(labels)
    twin = Float64Twin(model)
    per_sample = (-1,) + (1,) * (x.ndim - 1)
    radii = np.asarray(radii, "float64").reshape(per_sample)
    own = np.arange(model.output_shape[-1]) == labels[:, None]

    def excess(tensor):
        logits = twin.tensor(tensor)
        others = keras.ops.where(own, -np.inf, logits)
        label = keras.ops.sum(keras.ops.where(own, logits, 0), axis=-1)
        return keras.ops.max(others, axis=-1) - label

    def unit(v):
        norms = np.sqrt((v**2).sum(axis=tuple(range(1, v.ndim)), keepdims=True))
        return v / np.maximum(norms, 1e-300)

    ascent = backend.compiled(lambda t: backend.gradient(excess, t), twin.variables)
    delta = unit(np.random.default_rng(seed).normal(size=x.shape)) * radii / 2
    for _ in range(steps):
        delta = delta + step_size * radii * unit(twin.call(ascent, x + delta))
        norms = np.sqrt((delta**2).sum(axis=tuple(range(1, x.ndim)), keepdims=True))
        delta = delta * np.minimum(1, radii / np.maximum(norms, 1e-300))
    adversarial = x + delta
    return twin(adversarial).argmax(axis=-1) != labels, adversarial


def as_torch_module(
    model: keras.Model, data_format: str | None = None, logit_scale: float = 1.0
) -> Any:
    """A `torch.nn.Module` of the model, on any Keras backend, for the attack libraries.

    foolbox, the adversarial-robustness-toolbox and AutoAttack attack modules of PyTorch that map
    images, channels first, to logits. This one is deterministic (`training=False`) and
    differentiable once with respect to its input. It has no parameters: it reads the model's
    weights at each call, and no gradient reaches them.

    Example:

    ```python
    import foolbox, torch

    module = keras_lipnext.certification.as_torch_module(model, logit_scale=10)
    images = torch.tensor(x).permute(0, 3, 1, 2)
    attack = foolbox.attacks.L2PGD(steps=100)
    *_, broken = attack(
        foolbox.PyTorchModel(module, bounds=(0, 1)), images, torch.tensor(y), epsilons=0.25
    )
    ```

    On JAX the model is compiled for each power of two among the batch sizes, to which batches are
    padded; on TensorFlow once or twice. On both, tensors pass through the host's memory.

    Args:
        model: Built Keras model with one input and one output, the logits.
        data_format: Where the model expects the channels of its images: "channels_last" or
            "channels_first". None means `keras.config.image_data_format()`.
        logit_scale: Positive float that multiplies the logits. Predictions stay; attacks on the
            cross-entropy grow much stronger, for the margins of a 1-Lipschitz model are small:
            unscaled, it pulls towards all other classes at once. Margins of about 10 serve well.

    Returns:
        `torch.nn.Module`: from images of shape (batch, channels, height, width), or vectors or
        sequences as the model takes them, of any floating point dtype, to logits of shape (batch,
        classes), in the dtype and on the device of the inputs. Computes in the model's own
        precision.

    Raises:
        ImportError: if PyTorch is not installed.
        ValueError: if the model is not built, has several inputs or outputs or integer inputs, or
            `data_format` or `logit_scale` is not allowed; in a call, if inputs are integers or do
            not fit the model.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Expected a keras.Model. Received: {model!r} of type {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(f"Model '{model.name}' is not built: call it on data first.")
    # A subclassed model has no such lists: of it, the first call tells.
    inputs, outputs = getattr(model, "inputs", None), getattr(model, "outputs", None)
    if any(tensors is not None and len(tensors) != 1 for tensors in (inputs, outputs)):
        raise ValueError(
            f"Model '{model.name}' must have one input and one output. Received: "
            f"{len(inputs)} inputs and {len(outputs)} outputs."  # type: ignore[arg-type]
        )
    dtype = keras.backend.standardize_dtype(inputs[0].dtype if inputs else model.compute_dtype)
    if "float" not in dtype:
        raise ValueError(
            f"Model '{model.name}' takes inputs of dtype {dtype}: it has no gradient with respect "
            "to them to attack along."
        )
    data_format = data_format or keras.config.image_data_format()
    if data_format not in ("channels_last", "channels_first"):
        raise ValueError(
            "`data_format` must be 'channels_last' or 'channels_first'. Received: "
            f"data_format={data_format!r}"
        )
    if not 0 < logit_scale < np.inf:
        raise ValueError(
            f"`logit_scale` must be positive and finite. Received: logit_scale={logit_scale}"
        )
    channels_last = data_format == "channels_last"
    shape = tuple(inputs[0].shape) if inputs else None
    if shape and channels_last and len(shape) > 3:
        shape = (shape[0], shape[-1], *shape[1:-1])

    def prepare(x):
        if not x.is_floating_point():
            raise ValueError(f"Inputs must be floating point. Received: dtype {x.dtype}")
        if shape and (
            x.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, x.shape))
        ):
            raise ValueError(
                f"The module of model '{model.name}' takes inputs of shape {shape}. Received: a "
                f"batch of shape {tuple(x.shape)}"
            )
        return x.movedim(1, -1) if channels_last and x.ndim > 3 else x

    precision = "float64" if dtype == "float64" else "float32"
    return backend.torch_module(model, precision, prepare, float(logit_scale))
