"""The checks of `layer_checks` are no formality: each finds the layer that breaks it alone."""

import dataclasses
import math

import extended
import keras
import layer_checks
import pytest
from data import to_numpy
from layer_checks import Row
from test_layer_rules import needs_long

from keras_lipnext.layers.weights import NAMESPACE
from keras_lipnext.lipschitz.rules import base
from keras_lipnext.norms.roundoff import ROUNDING


@keras.saving.register_keras_serializable(NAMESPACE)
class Sound(keras.layers.Layer):
    """`scale * x + bias`, which says that its Lipschitz constant is 1."""

    lipschitz_constant = 1.0

    def __init__(self, scale=1.0, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.scale, self.data_format = scale, data_format

    def build(self, input_shape):
        self.bias = self.add_weight(name="bias", shape=())

    def call(self, inputs):
        return self.scale * inputs + self.bias

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale, "data_format": self.data_format}


class ForgetsAnArgument(Sound):
    def get_config(self):
        config = super().get_config()
        del config["scale"]
        return config


class SavesTheDefault(Sound):
    def get_config(self):
        return {**super().get_config(), "scale": 1.0}


class Stretches(Sound):
    def call(self, inputs):
        return 1.01 * super().call(inputs)


class StatesMoreThanNominal(Sound):
    lipschitz_constant = 1.01


class InventsTheBatchSize(Sound):
    def compute_output_shape(self, input_shape):
        return (2, *input_shape[1:])


class AnswersInFloat32(Sound):
    def call(self, inputs):
        return keras.ops.cast(super().call(inputs), "float32")


class SavesNoWeight(Sound):
    def save_own_variables(self, store):
        pass

    def load_own_variables(self, store):
        pass


class DoesNotTrain(Sound):
    def call(self, inputs):
        return super().call(inputs) - self.bias


class MixesTheBatch(Sound):
    def call(self, inputs):
        return inputs - keras.ops.mean(inputs, axis=0)


class TakesTheWrongAxis(Sound):
    def call(self, inputs):
        return keras.ops.flip(inputs, axis=1)


def row(cls):
    return Row(cls, {"scale": 0.999}, (2, 3, 4, 2), (2, 3, 4, 2))


def exact(layer, x):
    return extended.c(layer.scale) * x + extended.wide(layer.bias)


def rule(operations):
    def scaled(layer, context):
        rounding = operations * context.arithmetic.rounding
        size = math.sqrt(math.prod(context.input_shape)) * (1 + 4 * ROUNDING)
        offset = abs(float(to_numpy(layer.bias))) * size
        return base.Bound(abs(layer.scale), offset, rounding, rounding * offset)

    return scaled


def test_a_sound_layer_passes(monkeypatch):
    monkeypatch.setattr(base, "_LAYERS", dict(base._LAYERS))
    base.library_rule(Sound)(rule(4))
    layer_checks.check_layer(dataclasses.replace(row(Sound), exact=exact))


@needs_long
def test_a_rule_without_rounding_is_seen(monkeypatch):
    monkeypatch.setattr(base, "_LAYERS", dict(base._LAYERS))
    base.library_rule(Sound)(rule(0))
    with pytest.raises(AssertionError):
        layer_checks.check_rule(dataclasses.replace(row(Sound), exact=exact))


@pytest.mark.parametrize(
    "cls, check, message",
    [
        (ForgetsAnArgument, "config", r"\{'scale'\}"),
        (SavesTheDefault, "config", r"scale=0.999 is 1.0 in the config"),
        (Stretches, "certificate", r"1.008.* > 1.0.*, which is certified"),
        (StatesMoreThanNominal, "certificate", r"1.01.* > 1.0, the nominal one"),
        (InventsTheBatchSize, "shapes", "batch size 2, made of None"),
        (AnswersInFloat32, "dtypes", "float64"),
        (SavesNoWeight, "training_and_saving", "Arrays are not equal"),
        (DoesNotTrain, "training_and_saving", "bias did not train"),
        (MixesTheBatch, "batch_independence", "Not equal to tolerance"),
        (TakesTheWrongAxis, "data_formats", "Not equal to tolerance"),
    ],
)
def test_a_faulty_layer_is_seen(cls, check, message):
    with (
        keras.saving.custom_object_scope({cls.__name__: cls}),
        pytest.raises(AssertionError, match=message),
    ):
        getattr(layer_checks, f"check_{check}")(row(cls))
