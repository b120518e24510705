import sys

import keras
import numpy as np
import pytest
import torch
from data import called, dense_model, small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.certification import as_torch_module


def batch(*shape, dtype="float32"):
    return torch.tensor(np.random.default_rng(0).random(shape).astype(dtype))


def logits(model, x):
    return called(lambda x: model(x, training=False), np.asarray(x, "float32"))


def difference_slope(model, x):
    """Gradient of the first logit minus the second, by the backend itself."""

    def difference(t):
        y = model(t)
        return y[:, 0] - y[:, 1]

    return called(lambda t: backend.gradient(difference, t), np.asarray(x, "float32"))


def module_slope(module, x):
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    (out[:, 0] - out[:, 1]).sum().backward()
    return leaf.grad.numpy()


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_images_channels_last(policy):
    model = small_lipnext(input_shape=(8, 4, 3), depth=1, dtype=policy)
    module, x = as_torch_module(model), batch(5, 3, 8, 4)
    images = x.numpy().transpose(0, 2, 3, 1)
    out = module(x)
    assert out.shape == (5, 10)
    assert out.dtype == torch.float32
    # bfloat16 rounds by 2^-9: compiled, in another order.
    exact = policy == "float32"
    np.testing.assert_allclose(out.numpy(), logits(model, images), atol=1e-6 if exact else 0.05)
    if exact:
        slope = module_slope(module, x).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(slope, difference_slope(model, images), atol=1e-5)


def test_images_channels_first():
    keras.config.set_image_data_format("channels_first")
    model, x = small_lipnext(input_shape=(3, 8, 4), depth=1), batch(3, 3, 8, 4)
    module = as_torch_module(model)
    np.testing.assert_allclose(module(x).numpy(), logits(model, x), atol=1e-6)
    np.testing.assert_allclose(module_slope(module, x), difference_slope(model, x), atol=1e-5)
    keras.config.set_image_data_format("channels_last")
    explicit = as_torch_module(model, data_format="channels_first")
    np.testing.assert_array_equal(explicit(x).numpy(), module(x).numpy())


def test_vectors_of_a_subclassed_model():
    class Wrapper(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = dense_model()

        def call(self, x):
            return self.inner(x)

    model, x = Wrapper(), batch(4, 6)
    model(x.numpy())
    module = as_torch_module(model)
    np.testing.assert_allclose(module(x).numpy(), logits(model, x), atol=1e-6)
    np.testing.assert_allclose(module_slope(module, x), difference_slope(model, x), atol=1e-5)


def test_sequences_pass_unchanged():
    model = keras.Sequential([keras.Input((3, 2)), keras.layers.Flatten(), keras.layers.Dense(2)])
    x = batch(4, 3, 2)
    np.testing.assert_allclose(as_torch_module(model)(x).numpy(), logits(model, x), atol=1e-6)


def test_float64_in_and_out():
    module, x = as_torch_module(dense_model()), batch(4, 6, dtype="float64")
    out = module(x)
    assert out.dtype == torch.float64
    np.testing.assert_array_equal(out.numpy(), module(x.float()).double().numpy())
    slope = module_slope(module, x)
    assert slope.dtype == np.float64
    np.testing.assert_array_equal(slope, module_slope(module, x.float()))


def test_a_float64_model_computes_in_float64():
    with backend.float64_scope():
        inputs = keras.Input((6,), dtype="float64")
        model = keras.Model(inputs, keras.layers.Dense(4, dtype="float64")(inputs))
        x = batch(3, 6, dtype="float64")
        expected = x.numpy() @ np.asarray(to_numpy(model.layers[-1].kernel))
        np.testing.assert_allclose(as_torch_module(model)(x).numpy(), expected, atol=1e-14)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7])
def test_varying_batches(size):
    model = dense_model()
    module = as_torch_module(model)
    for n in (size, 5, size):
        x = batch(n, 6)
        assert module(x).shape == (n, 4)
        slope = module_slope(module, x)
        np.testing.assert_allclose(slope, difference_slope(model, x), atol=1e-5)


def test_gradients_of_each_logit_from_one_evaluation():
    module, x = as_torch_module(dense_model()), batch(3, 6).requires_grad_()
    out = module(x)
    slopes = [torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)[0] for i in (0, 1)]
    expected = module_slope(module, x.detach())
    np.testing.assert_allclose((slopes[0] - slopes[1]).numpy(), expected, atol=1e-6)


def test_reads_current_weights_and_leaves_them_alone():
    model, x = dense_model(), batch(3, 6)
    module = as_torch_module(model)
    before = module(x).numpy()
    assert not list(module.parameters())
    assert not module.training
    module_slope(module, x)
    if keras.backend.backend() == "torch":
        assert all(p.grad is None for p in model.parameters())
    bias = model.head.bias
    bias.assign(to_numpy(bias) + 1)
    np.testing.assert_allclose(module(x).numpy(), before + 1, atol=1e-6)


def test_is_deterministic():
    inputs = keras.Input((6,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dropout(0.5)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    x = batch(4, 6)
    module, state = as_torch_module(model), [to_numpy(w) for w in model.non_trainable_variables]
    np.testing.assert_array_equal(module(x).numpy(), module(x).numpy())
    np.testing.assert_allclose(module(x).numpy(), logits(model, x), atol=1e-6)
    for before, weight in zip(state, model.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(before, to_numpy(weight))


def test_no_gradients_recorded_without_need():
    module, x = as_torch_module(dense_model()), batch(2, 6)
    assert not module(x).requires_grad
    with torch.no_grad():
        assert not module(x.requires_grad_()).requires_grad
    assert module(x).requires_grad


def test_scaled_logits():
    model, x = dense_model(), batch(3, 6)
    plain, scaled = as_torch_module(model), as_torch_module(model, logit_scale=10)
    np.testing.assert_allclose(scaled(x).numpy(), 10 * plain(x).numpy(), atol=1e-5)
    slope = module_slope(scaled, x)
    np.testing.assert_allclose(slope, 10 * module_slope(plain, x), atol=1e-5)


def unbuilt():
    return keras.Sequential([keras.layers.Dense(3)])


def two_inputs():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    return keras.Model(inputs, keras.layers.Add()(inputs))


def two_outputs():
    inputs = keras.Input((3,))
    return keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(2)(inputs)])


def integer_inputs():
    inputs = keras.Input((3,), dtype="int32")
    return keras.Model(inputs, keras.layers.Flatten()(keras.layers.Embedding(4, 2)(inputs)))


@pytest.mark.parametrize(
    "make, message",
    [
        (unbuilt, "is not built"),
        (two_inputs, "2 inputs and 1 outputs"),
        (two_outputs, "1 inputs and 2 outputs"),
        (integer_inputs, "takes inputs of dtype int32"),
        (lambda: keras.layers.Dense(3), "Expected a keras.Model"),
    ],
)
def test_models_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        as_torch_module(make())


def test_subclassed_model_with_two_outputs():
    class Twice(keras.Model):
        def call(self, x):
            return x, x

    model = Twice()
    model(np.ones((1, 3)))
    with pytest.raises(ValueError, match="must have one output"):
        as_torch_module(model)(batch(2, 3))


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match="channels_middle"):
        as_torch_module(dense_model(), data_format="channels_middle")
    for scale in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="logit_scale"):
            as_torch_module(dense_model(), logit_scale=scale)
    module = as_torch_module(small_lipnext())
    with pytest.raises(ValueError, match=r"\(None, 1, 8, 8\).*\(2, 8, 8, 1\)"):
        module(batch(2, 8, 8, 1))
    with pytest.raises(ValueError, match="floating point"):
        module(torch.ones((2, 1, 8, 8), dtype=torch.uint8))


def test_without_pytorch(monkeypatch):
    model = dense_model()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'keras_lipnext\[torch\]'"):
        as_torch_module(model)


@pytest.mark.slow
def test_foolbox_in_three_lines(trained, digits):
    foolbox = pytest.importorskip("foolbox")
    x, y = digits[1][0][:40], digits[1][1][:40]
    images = torch.tensor(x).permute(0, 3, 1, 2)
    clean = (logits(trained, x).argmax(axis=-1) == y).mean()

    module = as_torch_module(trained)
    attack = foolbox.attacks.L2PGD(steps=10, rel_stepsize=0.2)
    *_, broken = attack(
        foolbox.PyTorchModel(module, bounds=(0, 1)), images, torch.tensor(y), epsilons=[0.01, 2.0]
    )

    certified = lip.certify(trained, x, y, epsilons=0.01, verbose=0).certified_accuracy[0.01]
    assert certified <= 1 - broken[0].float().mean() <= clean
    assert 1 - broken[1].float().mean() < 0.2


def test_second_derivatives_are_right_or_an_error():
    """Not 0, as of a linear function."""
    torch = pytest.importorskip("torch")
    inputs = keras.Input((2,))
    head = keras.layers.Dense(2, use_bias=False, kernel_initializer="ones")
    model = keras.Model(inputs, head(keras.layers.Activation("sigmoid")(inputs)))
    module = lip.certification.as_torch_module(model)
    x = torch.ones(1, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    penalised = slope.sum() + x.sum()  # another path, beside which nothing would be missed
    s = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(slope.detach(), np.full((1, 2), 2 * s * (1 - s)), rtol=1e-5)
    if keras.backend.backend() == "torch":
        (second,) = torch.autograd.grad(penalised, x)
        expected = 1 + 2 * s * (1 - s) * (1 - 2 * s)
        np.testing.assert_allclose(second, np.full((1, 2), expected), rtol=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"no second derivatives.*KERAS_BACKEND=torch"):
            torch.autograd.grad(penalised, x)
