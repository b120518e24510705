import keras
import numpy as np
import pytest

import keras_lipnext as lip


def critic():
    inputs = keras.Input((3,))
    return keras.Model(inputs, lip.layers.OrthogonalDense(1)(inputs))


def test_it_is_the_difference_of_means_over_all_batches():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(50, 1)), rng.integers(0, 2, 50)
    weights = rng.uniform(size=50)
    metric = lip.metrics.WassersteinEstimate(dtype="float32")
    assert float(metric.result()) == 0
    for rows in (slice(0, 20), slice(20, 50)):  # labels as numbers, and as signs in a column
        y = labels[rows] if rows.start == 0 else 2 * labels[rows, None] - 1
        metric.update_state(y, values[rows].astype("float32"), weights[rows])
    mean = [np.average(values[labels == k, 0], weights=weights[labels == k]) for k in (0, 1)]
    assert float(metric.result()) == pytest.approx(mean[1] - mean[0], rel=1e-5)
    metric.reset_state()
    metric.update_state(np.ones(4), np.ones((4, 1), "float32"))
    assert float(metric.result()) == 0  # of one of the two there is no difference


def test_it_is_what_the_loss_earns_and_below_the_distance(tmp_path):
    """In `fit`, saved and loaded: of batches with both it is minus the loss; W1 is sqrt(3)."""
    x = np.concatenate([np.zeros((8, 3)), np.ones((8, 3))]).astype("float32")
    y = np.repeat([0, 1], 8)
    model = critic()
    metric = lip.metrics.WassersteinEstimate()
    model.compile(keras.optimizers.SGD(0.1), lip.losses.KantorovichRubinstein(), metrics=[metric])
    model.fit(x, y, batch_size=16, epochs=30, verbose=0)
    model.save(tmp_path / "critic.keras")
    for found in (model, keras.saving.load_model(tmp_path / "critic.keras")):
        logs = found.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
        assert logs["wasserstein_estimate"] == pytest.approx(-logs["loss"], rel=1e-5)
        assert 0.9 * 3**0.5 < logs["wasserstein_estimate"] <= 3**0.5 * (1 + 1e-5)


def test_several_outputs_are_refused():
    with pytest.raises(ValueError, match=r"Received: y_pred of \(4, 2\)"):
        lip.metrics.WassersteinEstimate().update_state(np.ones(4), np.ones((4, 2), "float32"))
