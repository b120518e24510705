"""`certify` on data of every kind, and on data that cannot be right."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from data import dense_model

import keras_lipnext as lip


def test_batching_and_order_change_nothing(trained, digits):
    _, (x, y) = digits
    x, y = x[:50], y[:50]
    whole = lip.certify(trained, x, y, verbose=0)
    parts = lip.certify(trained, x, y, batch_size=7, verbose=0)
    backwards = lip.certify(trained, x[::-1], y[::-1], verbose=0)
    np.testing.assert_allclose(parts.radii, whole.radii, rtol=1e-10)
    np.testing.assert_allclose(backwards.radii[::-1], whole.radii, rtol=1e-10)


def data_sets(x, y):
    """Everything `certify` takes, by name."""

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            part = slice(10 * index, 10 * index + 10)
            return x[part], y[part]

    def batches():
        for start in range(0, 30, 10):
            yield x[start : start + 10], y[start : start + 10]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(torch.tensor(x), torch.tensor(y)))

    tensors = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    signature = (tf.TensorSpec((None, 8, 8, 1)), tf.TensorSpec((None,), tf.int64))
    return {
        "lists": (x.tolist(), y.tolist()),
        "one-hot labels": (x, np.eye(10)[y]),
        "column labels": (x, y[:, None].astype("float32")),
        "backend tensors": (keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)),
        "tf.data": (tf.data.Dataset.from_tensor_slices((x, y)).batch(7),),
        "tf.data of unknown length": (
            tf.data.Dataset.from_generator(batches, output_signature=signature),
        ),
        "torch loader": (torch.utils.data.DataLoader(tensors, batch_size=7),),
        "torch stream": (torch.utils.data.DataLoader(Stream(), batch_size=7),),
        "PyDataset": (Sequence(),),
        "generator": (batches(),),
        "list of batches": (list(batches()),),
    }


@pytest.fixture(scope="module")
def expected(trained, digits):
    """(30 images, their labels, their certificate)."""
    _, (x, y) = digits
    return x[:30], y[:30], lip.certify(trained, x[:30], y[:30], verbose=0)


@pytest.mark.parametrize(
    "name",
    [
        "lists",
        "one-hot labels",
        "column labels",
        "backend tensors",
        "tf.data",
        "tf.data of unknown length",
        "torch loader",
        "torch stream",
        "PyDataset",
        "generator",
        "list of batches",
    ],
)
def test_data_of_every_kind(name, trained, expected):
    x, y, expected = expected
    actual = lip.certify(trained, *data_sets(x, y)[name], verbose=0)
    np.testing.assert_allclose(actual.radii, expected.radii, rtol=1e-10)
    np.testing.assert_array_equal(actual.labels, y)
    assert actual.certified_accuracy == expected.certified_accuracy


def test_without_labels(trained, digits):
    _, (x, _) = digits
    certificate = lip.certify(trained, x[:20], epsilons=[0.05], verbose=0)
    assert certificate.labels is None
    assert certificate.clean_accuracy is None
    assert certificate.certified_accuracy is None
    assert certificate.certified_share[0.05] == (certificate.radii > 0.05).mean()


def test_progress_is_shown_unless_silenced(trained, digits, capsys):
    _, (x, _) = digits
    lip.certify(trained, x[:20], batch_size=10, verbose=0)
    assert capsys.readouterr().out == ""
    lip.certify(trained, x[:20], batch_size=10)
    assert "2/2" in capsys.readouterr().out


X = np.zeros((4, 6), "float32")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X, np.zeros(3)), r"Received 4 inputs and 3 labels"),
        ((X, [0, 1, 2, 4]), r"4 classes: labels are whole numbers from 0 to 3.*from 0 to 4"),
        ((X, [0, -1, 0, 0]), r"Received: labels from -1 to 0"),
        ((X, [0.5, 0, 0, 0]), r"whole numbers"),
        ((X, np.eye(5)[:4]), r"one-hot rows, shape \(n, 4\). Received: shape=\(4, 5\)"),
        ((X[:, :5],), r"inputs of shape \(None, 6\). Received: a batch of shape \(4, 5\)"),
        ((X[:0],), r"received 0 inputs"),
        ((iter([]),), r"yielded no batch"),
        (((X, np.zeros(4)),), r"Received a pair as `x`"),
        (({"x": X},), r"Expected one array or data set as `x`. Received: dict"),
        ((np.float32(3.0),), r"Expected an array with a batch axis"),
        ((object(),), r"Expected an array, a tf.data.Dataset"),
        ((iter([X]), np.zeros(4)), r"`y` goes with an array `x`"),
        ((iter([(X, np.zeros(3))]),), r"A batch has 4 inputs.* 3 labels"),
        ((iter([(X, np.zeros(4)), X]),), r"Some batches of the data set had labels"),
    ],
)
def test_bad_data(arguments, message):
    with pytest.raises(ValueError, match=message):
        lip.certify(dense_model(), *arguments, verbose=0)


@pytest.mark.parametrize("epsilons", [-0.1, [0.1, np.nan], [np.inf]])
def test_bad_epsilons(epsilons):
    with pytest.raises(ValueError, match=r"`epsilons` must be finite and not negative"):
        lip.certify(dense_model(), X, epsilons=epsilons, verbose=0)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match=r"`batch_size` must be a positive integer"):
        lip.certify(dense_model(), X, batch_size=batch_size, verbose=0)


def test_not_a_classifier():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.ops.sum(inputs, axis=-1))
    with pytest.raises(ValueError, match=r"logits of shape \(batch, classes\).*Received"):
        lip.certify(model, np.zeros((1, 4)), verbose=0)


# What one array, one sample and a fixed batch size are.


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">i2", "longdouble"])
def test_arrays_of_other_byte_orders_and_widths(dtype):
    model, x = dense_model(), np.arange(-12, 12).reshape(4, 6) / 2
    x = x // 1 if ">i" in dtype else x
    y = np.arange(4)
    expected = lip.certify(model, x, y, verbose=0)
    actual = lip.certify(model, x.astype(dtype), y.astype(">i4"), verbose=0)
    np.testing.assert_array_equal(actual.radii, expected.radii)
    assert actual.input_range == expected.input_range
    (actual,) = [lip.certify(model, iter([(x.astype(dtype), y.astype(">i4"))]), verbose=0)]
    np.testing.assert_array_equal(actual.radii, expected.radii)


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="longdouble is float64 here")
def test_numbers_wider_than_float64_are_refused():
    x = np.ones((2, 6), np.longdouble)
    x[0, 0] += np.finfo(np.longdouble).eps
    with pytest.raises(ValueError, match="that float64 does not hold: round them"):
        lip.certify(dense_model(), x, verbose=0)


@pytest.mark.parametrize(
    "arguments",
    [(X[0], np.int64(1)), (X[0],), (X[0], np.eye(4)[0]), (X, np.int64(1)), (iter([(X[0], 1)]),)],
)
def test_one_sample_without_batch_axis(arguments):
    with pytest.raises(ValueError, match=r"for one sample pass `x\[None\]` and `y\[None\]`.*Rec"):
        lip.certify(dense_model(), *arguments, verbose=0)


def test_a_model_of_fixed_batch_size_takes_any_number_of_samples():
    model = dense_model()
    inputs = keras.Input(batch_shape=(4, 6))
    fixed = keras.Model(inputs, model(inputs))
    x = np.random.default_rng(0).normal(size=(10, 6))
    expected = lip.certify(model, x, verbose=0).radii
    np.testing.assert_allclose(lip.certify(fixed, x, verbose=0).radii, expected, rtol=1e-10)
    np.testing.assert_allclose(lip.certify(fixed, x[:3], verbose=0).radii, expected[:3], rtol=1e-10)
    with pytest.raises(ValueError, match=r"built for batches of 4 samples. Received: a batch of 5"):
        lip.certify(fixed, iter([x[:5]]), verbose=0)
