"""LipNeXt trained by a loop written by hand in JAX, for comparison with `model.fit`.

The mathematics of `keras_lipnext.LipNeXt` on images in patches of 4 x 4 with EMMA (no ramp) and
ManifoldAdam: model, loss, metrics, Adam and loop in plain JAX. Only the steps on the manifold are
the library's pure functions, `rotate` and `retr`, so that both sides take the same branches.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from keras_lipnext.manifolds import rotate, stiefel

PATCH, BETA = 4, 0.75
PERIOD = 8  # steps between two removals of drift
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7
MANIFOLD = ("stem", "mixing", "dense")


class Settings(NamedTuple):
    """What the compiled step holds fixed."""

    learning_rate: float
    demanded: float
    certified: float
    temperature: float


def initial(model):
    """Parameters of a Keras LipNeXt: {name: array}, the blocks' stacked."""
    blocks = [layer for layer in model.layers if layer.name.startswith("block_")]

    def stack(read):
        return jnp.stack([jnp.array(read(block).value) for block in blocks])

    return {
        "stem": jnp.array(model.get_layer("patch_embedding").kernel.value)[None],
        "position": stack(lambda b: b.positional_bias.bias),
        "mixing": stack(lambda b: b.mixing.kernel),
        "dense": stack(lambda b: b.dense.kernel),
        "bias": stack(lambda b: b.dense.bias),
        "head": jnp.array(model.head.kernel.value),
        "head_bias": jnp.array(model.head.bias.value),
    }


def shift(x):
    up, down, left, right = jnp.split(x, 4, axis=-1)
    moved = jnp.roll(up, -1, 1), jnp.roll(down, 1, 1), jnp.roll(left, -1, 2), jnp.roll(right, 1, 2)
    return jnp.concatenate(moved, axis=-1)


def logits_of(p, images):
    n, height, width, channels = images.shape
    x = (images - 0.5).reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // PATCH, width // PATCH, -1)
    x = x @ p["stem"][0]
    rectified = jnp.arange(x.shape[-1]) < round(BETA * x.shape[-1])
    for position, mixing, dense, bias in zip(p["position"], p["mixing"], p["dense"], p["bias"]):
        x = x + position
        rows = x @ mixing
        x = x + (shift(rows) - rows) @ mixing.T
        x = x @ dense + bias
        x = jnp.where(rectified, jnp.abs(x), x)
    pooled = jnp.sqrt(jnp.sum(x**2, axis=(1, 2)) + 1e-12)
    return pooled @ p["head"] + p["head_bias"]


def distances_of(head):
    squares = jnp.sum(head**2, axis=0)
    squared = squares[:, None] + squares[None, :] - 2 * head.T @ head
    squared = jnp.maximum(squared, 0) * (1 - jnp.eye(len(squares)))
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def emma(p, x, y, s):
    logits, distances = logits_of(p, x), distances_of(p["head"])
    own = jax.nn.one_hot(y, logits.shape[-1], dtype=bool)
    d = logits - jnp.sum(own * logits, axis=-1, keepdims=True)
    margin = s.demanded * distances[y]
    share = jnp.where(own, 1, jnp.clip(-d / jnp.where(own, 1, margin), 0.01, 1))
    scaled = s.temperature * (d + jax.lax.stop_gradient(share) * margin)
    loss = -jnp.mean(jnp.sum(own * jax.nn.log_softmax(scaled), axis=-1)) / s.temperature
    correct = jnp.argmax(logits, axis=-1) == y
    radii = jnp.min(jnp.where(own, jnp.inf, -d / jnp.where(own, 1, distances[y])), axis=-1)
    return loss, (jnp.mean(correct), jnp.mean(correct & (radii > s.certified)))


def adam(gradient, moments, step, rate):
    m, v = moments
    m = m + (gradient - m) * (1 - BETA_1)
    v = v + (gradient**2 - v) * (1 - BETA_2)
    alpha = rate * jnp.sqrt(1 - BETA_2**step) / (1 - BETA_1**step)
    return m * alpha / (jnp.sqrt(v) + EPSILON), (m, v)


def move(name, x, gradient, moments, step, rate):
    if name not in MANIFOLD:
        change, moments = adam(gradient, moments, step, rate)
        x = x - change
        return (x / (1e-7 + jnp.linalg.norm(x, axis=0)) if name == "head" else x), moments
    if name != "dense":
        change, moments = adam(stiefel.proju(x, gradient), moments, step, rate)
        return stiefel.retr(x, stiefel.proju(x, -change)), moments
    tangent = x.mT @ gradient
    change, moments = adam((tangent - tangent.mT) / 2, moments, step, rate)
    x = rotate(x, -change, period=PERIOD)
    return jax.lax.cond((step - 1) % PERIOD == 0, stiefel.projx, lambda x: x, x), moments


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def training_step(settings, state, sums, x, y):
    p, moments, step = state
    # Gradients of the unstacked blocks are stacked once; those of slices would be added up.
    stacked = {k: v for k, v in p.items() if k in ("position", "mixing", "dense", "bias")}
    parts = {**p, **{k: list(v) for k, v in stacked.items()}}
    (loss, metrics), gradients = jax.value_and_grad(emma, has_aux=True)(parts, x, y, settings)
    gradients |= {k: jnp.stack(gradients[k]) for k in stacked}
    step = step + 1
    moved = {k: move(k, p[k], gradients[k], moments[k], step, settings.learning_rate) for k in p}
    state = {k: v[0] for k, v in moved.items()}, {k: v[1] for k, v in moved.items()}, step
    return state, sums + jnp.stack([loss, *metrics])


class Loop:
    """The training loop: `epoch` trains on arrays once and returns mean loss and metrics."""

    def __init__(self, model, settings):
        parameters = initial(model)
        moments = {k: (jnp.zeros_like(v), jnp.zeros_like(v)) for k, v in parameters.items()}
        self._state = parameters, moments, jnp.zeros((), jnp.int32)
        self._settings = settings

    def epoch(self, x, y, batch_size):
        sums, starts = jnp.zeros(3), range(0, len(x), batch_size)
        for i in starts:
            batch = x[i : i + batch_size], y[i : i + batch_size]
            self._state, sums = training_step(self._settings, self._state, sums, *batch)
        jax.block_until_ready(self._state)
        return [float(value) / len(starts) for value in sums]
