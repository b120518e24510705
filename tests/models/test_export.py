"""`model.export` to every format that Keras writes on a backend: the outputs of what is written."""

import accelerated
import keras
import numpy as np
import pytest

import keras_lipnext as lip

pytestmark = pytest.mark.slow

BACKEND = keras.backend.backend()
IMAGES = np.random.default_rng(0).random((3, 8, 8, 1)).astype("float32")


def every_layer():
    """One model of all layers."""
    layers = lip.layers
    inputs = x = keras.Input((8, 8, 1))
    for layer in (
        layers.PatchEmbedding(patch_size=2, units=16),
        layers.PositionalBias(),
        layers.SpatialShift(),
        layers.SpatialShift(ratio=3 / 16, padding="zero"),
        layers.SpatialShift(ratio=1 / 4),
        layers.ShiftMixing(),
        layers.ShiftMixing(padding="zero"),
        layers.FullShiftMixing(),
        layers.FullShiftMixing(padding="zero"),
        layers.BetaAbs(),
        layers.MaxMin(),
        layers.GroupSort(4),
        layers.Householder(),
        layers.Scale(),
        layers.LipNeXtBlock(),
        layers.SDPConv2D(16, 3),
        layers.SDPResidualConv2D(16, 3),
        layers.L2Pool(),
        layers.OrthogonalDense(16),
        layers.SDPDense(16),
        layers.SDPResidualDense(16),
        layers.SandwichDense(16),
        layers.NormalizedDense(4),
    ):
        x = layer(x)
    return keras.Model(inputs, x)


SHAPES = {"input_shape": (8, 8, 1), "num_classes": 4, "depth": 1, "width": 16}
MODELS = {
    "every layer": every_layer,
    "LipNeXt": lambda: lip.LipNeXt(**SHAPES, patch_size=2),
    "LipNeXt, full": lambda: lip.LipNeXt(**SHAPES, patch_size=2, mixing="full", padding="zero"),
    "SLLNet": lambda: lip.SLLNet(**SHAPES, dense_depth=1, hidden_filters=4, hidden_units=8),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
# What converters say of themselves.
quiet = pytest.mark.filterwarnings("ignore")


def called(model):
    """The model, as Keras' exports ask for it."""
    model(IMAGES)
    return model


def assert_written(model, answer, x=IMAGES):
    expected = keras.ops.convert_to_numpy(model(x))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(answer, expected, atol=1e-6)


@quiet
@every_model
@pytest.mark.skipif(BACKEND == "torch", reason="Keras writes none of its own models there")
def test_tf_saved_model(make, tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = called(make())
    model.export(tmp_path / "model", "tf_saved_model", verbose=False)
    reloaded = tf.saved_model.load(tmp_path / "model")
    assert_written(model, reloaded.serve(IMAGES).numpy())


@quiet
@every_model
@pytest.mark.skipif(BACKEND == "jax", reason="jax2onnx does not know the shapes of batches")
def test_onnx(make, tmp_path):
    needed = {"torch": ("onnx", "onnxscript"), "tensorflow": ("tf2onnx",)}[BACKEND]
    for package in needed:
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    model = called(make())
    model.export(tmp_path / "model.onnx", "onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: IMAGES})
    assert_written(model, answer)


@accelerated.of_cpus("an exported program stays on its device")
@quiet
@every_model
@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
def test_torch(make, tmp_path):
    """The batch's size is fixed, and 1 if none is given."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("keras.src.export.torch", reason="from Keras 3.15 on")

    model = called(make())
    model.export(tmp_path / "model.pt2", "torch", verbose=False)
    program = torch.export.load(tmp_path / "model.pt2")
    answer = program.module()(torch.tensor(IMAGES[:1])).detach().numpy()
    assert_written(model, answer, IMAGES[:1])


@quiet
@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_litert(tmp_path):
    import tensorflow as tf

    model = called(MODELS["SLLNet"]())
    file = str(tmp_path / "model.tflite")
    model.export(file, "litert", verbose=False)
    interpreter = tf.lite.Interpreter(file)
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(given["index"], IMAGES.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], IMAGES)
    interpreter.invoke()
    assert_written(model, interpreter.get_tensor(made["index"]))
