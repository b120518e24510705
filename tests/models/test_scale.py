"""What large models need: mixed precision that does not drift, rematerialisation, accumulation."""

import keras
import numpy as np
import pytest
from accelerated import ON_CPU
from data import small_lipnext, to_numpy

import keras_lipnext as lip
from keras_lipnext import backend
from keras_lipnext.manifolds import Stiefel, stiefel


@pytest.mark.slow
def test_mixed_precision_trains_as_float32_does(digits, trained):
    """Float32 kernels and moments, no drift, the same accuracy; benchmarks/bfloat16.py goes on."""
    (x, y), (x_test, y_test) = digits
    keras.utils.set_random_seed(1)
    mixed = small_lipnext(width=32, epsilon=0.1, dtype="mixed_bfloat16")
    mixed.fit(x[:1344], y[:1344], batch_size=64, epochs=4, verbose=0)  # as `trained` was
    reached = []
    for model in (trained, mixed):
        for variable in model.trainable_variables + model.optimizer.variables:
            dtype = keras.backend.standardize_dtype(variable.dtype)
            assert dtype == "float32" or variable.shape == ()
        for variable in model.trainable_variables:
            if isinstance(variable.constraint, Stiefel):
                assert float(stiefel.defect(variable)) < 2e-6
        certificate = model.certify(x_test, y_test, epsilons=[0.1], verbose=0)
        loss = model.evaluate(x_test[:384], y_test[:384], return_dict=True, verbose=0)["loss"]
        reached += [[certificate.clean_accuracy, certificate.certified_accuracy[0.1], loss]]
    plain, mixed = reached
    assert plain[1] > 0.7
    np.testing.assert_allclose(mixed[:2], plain[:2], atol=0.03 if ON_CPU else 0.04)
    np.testing.assert_allclose(mixed[2], plain[2], rtol=0.1)


def test_mixed_precision_multiplies_in_bfloat16(digits, monkeypatch):
    """All matrix products but the head's, which like the pooling is in float32."""
    seen = []
    multiply = keras.ops.matmul

    def noted(a, b):
        result = multiply(a, b)
        seen.append(keras.backend.standardize_dtype(result.dtype))
        return result

    model = small_lipnext(dtype="mixed_bfloat16")
    monkeypatch.setattr(keras.ops, "matmul", noted)
    model(digits[0][0][:2])
    assert seen == ["bfloat16"] * (1 + 2 * 3) + ["float32"]


jax_on_cpu = keras.backend.backend() == "jax" and backend.on_cpu()
if jax_on_cpu:
    pytestmark = pytest.mark.filterwarnings("ignore:`remat=True` saves nothing")


@pytest.mark.skipif(not jax_on_cpu, reason="remat works")
def test_remat_warns_where_it_saves_nothing():
    with pytest.warns(UserWarning, match=r"`remat=True` saves nothing on JAX's CPU backend"):
        small_lipnext(remat=True)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX's programs")
def test_jax_programs_recompute_each_block():
    """What an accelerator's compiler is handed: one barrier a block, against merging."""
    import jax

    def barriers(remat):
        model = small_lipnext(remat=remat)
        weights, others = (
            [v.value for v in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        )

        def total(weights, x):
            return keras.ops.sum(model.stateless_call(weights, others, x, training=True)[0])

        gradient = jax.jit(jax.grad(total))
        text = gradient.lower(weights, np.zeros((4, *model.input_shape[1:]), "float32")).as_text()
        return text.count("optimization_barrier")

    assert barriers(remat=False) == 0
    assert barriers(remat=True) == 2


@pytest.mark.parametrize(
    "policy, mixing",
    [
        ("float32", "full"),
        ("mixed_bfloat16", "reduced"),
        pytest.param("float32", "reduced", marks=pytest.mark.once),
        pytest.param("mixed_bfloat16", "full", marks=pytest.mark.once),
    ],
)
def test_rematerialisation_computes_the_same(policy, mixing, digits, tmp_path):
    (x, y), _ = digits
    models = []
    for remat in (False, True):
        keras.utils.set_random_seed(2)
        model = small_lipnext(depth=1, remat=remat, dtype=policy, mixing=mixing)
        losses = model.fit(x[:64], y[:64], batch_size=32, shuffle=False, epochs=2, verbose=0)
        models.append((model, losses.history["loss"]))
    (plain, expected), (model, actual) = models
    tolerance = 1e-5 if policy == "float32" else 1e-2
    np.testing.assert_allclose(actual, expected, rtol=tolerance)
    for a, b in zip(plain.get_weights(), model.get_weights()):
        np.testing.assert_allclose(a, b, atol=10 * tolerance)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_config()["remat"] is True
    assert loaded.get_layer("block_0")._remat_mode.layer_names == ["block_0"]
    np.testing.assert_array_equal(to_numpy(loaded(x[:4])), to_numpy(model(x[:4])))
    radii = [m.certify(x[:20], verbose=0).radii for m in (loaded, model)]
    np.testing.assert_array_equal(*radii)
    assert model.reduced().get_config()["remat"] is True


def test_only_blocks_are_rematerialised():
    """A part recomputed inside a block that is recomputed would be computed three times."""
    block = small_lipnext(remat=True).get_layer("block_1")
    assert block._remat_mode.layer_names == ["block_0", "block_1"]
    for part in block.parts:
        assert part.name not in part._remat_mode.layer_names
    assert small_lipnext().get_layer("block_1")._remat_mode is None


def test_remat_must_be_a_boolean():
    with pytest.raises(ValueError, match=r"`remat` must be True or False. Received: remat='full'"):
        small_lipnext(remat="full")


def test_accumulated_gradients_train_like_the_large_batch(digits):
    (x, y), _ = digits
    x, y = x[:256], y[:256]
    weights = []
    for parts in (1, 4):
        keras.utils.set_random_seed(2)
        model = small_lipnext(depth=1, compile=False)
        optimizer = lip.optimizers.ManifoldMuon(
            0.02, gradient_accumulation_steps=None if parts == 1 else parts
        )
        model.compile(optimizer, lip.losses.EMMA(0.3, ramp=0))
        model.fit(x, y, batch_size=64 // parts, shuffle=False, epochs=2, verbose=0)
        weights.append(model.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_allclose(a, b, atol=2e-3)
