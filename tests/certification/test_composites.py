"""`certified_parts`: composite layers that are the composition of their sub-layers, and say so."""

import accelerated
import keras
import numpy as np
import pytest
from data import small_lipnext

import keras_lipnext as lip
from keras_lipnext.lipschitz import composites
from keras_lipnext.lipschitz.composites import check_composites
from keras_lipnext.lipschitz.graph import trace

X = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")


@keras.saving.register_keras_serializable("test_composites")
class Pair(keras.layers.Layer):
    """Two Dense layers and a ReLU between them."""

    def __init__(self, units=5, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = keras.layers.Dense(units, name="first", dtype=self.dtype_policy)
        self.relu = keras.layers.ReLU(name="relu", dtype=self.dtype_policy)
        self.second = lip.layers.OrthogonalDense(units, name="second", dtype=self.dtype_policy)

    def certified_parts(self):
        return (self.first, self.relu, self.second)

    def build(self, input_shape):
        for part in self.certified_parts():
            part.build(input_shape)
            input_shape = part.compute_output_shape(input_shape)

    def call(self, inputs):
        return self.second(self.relu(self.first(inputs)))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Outer(keras.layers.Layer):
    """A composite of a composite, a nested model and a layer that training alone reads."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pair = Pair(4, name="pair")
        self.dropout = keras.layers.Dropout(0.5)
        self.body = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="inner")])

    def certified_parts(self):
        return (self.pair, self.dropout, self.body)

    def build(self, input_shape):
        self.pair.build(input_shape)
        self.dropout.build(input_shape)

    def call(self, inputs, training=None):
        return self.body(self.dropout(self.pair(inputs), training=training))


def model_of(layer, shape=(4,), classes=3, dtype=None):
    inputs = keras.Input(shape)
    x = layer(inputs)
    return keras.Model(inputs, lip.layers.NormalizedDense(classes, dtype=dtype)(x))


def chain_of(pair, head):
    """The model of the composite's own parts, written out."""
    inputs = keras.Input((4,))
    x = inputs
    for part in pair.certified_parts():
        x = part(x)
    return keras.Model(inputs, head(x))


@pytest.mark.parametrize("lipschitz", ["product", "eclipse_fast"])
def test_a_composite_has_the_certificate_of_its_parts(lipschitz):
    pair = Pair()
    model = model_of(pair)
    plain = chain_of(pair, model.layers[-1])
    ours = lip.certify(model, X, verbose=0, lipschitz=lipschitz)
    theirs = lip.certify(plain, X, verbose=0, lipschitz=lipschitz)
    np.testing.assert_array_equal(ours.radii, theirs.radii)
    assert ours.radii.max() > 0
    assert (ours.constant, ours.body_constant) == (theirs.constant, theirs.body_constant)
    layers, parts = ours.evidence.bound.layers, theirs.evidence.bound.layers
    assert [layer.constant for layer in layers] == [layer.constant for layer in parts]
    assert all(layer.proven for layer in layers)
    # The parts are proven; that they are the layer is its author's word: `--strict` fails.
    assert ours.evidence.bound.declared == (pair.name,)
    assert [layer.name for layer in layers] == [f"{pair.name}/{part.name}" for part in parts]
    assert ours.evidence.weights_hash == theirs.evidence.weights_hash
    (note,) = ours.evidence.bound.notes
    assert note.startswith(f"Layer '{pair.name}' (Pair) counts as its parts, first, relu, second,")
    assert note in str(ours) and not theirs.evidence.bound.notes


def test_saved_and_loaded(tmp_path):
    model = model_of(Pair())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert trace(loaded).digest() == trace(model).digest()
    assert lip.lipschitz_bound(loaded).constant == lip.lipschitz_bound(model).constant


def test_composites_of_composites_and_models():
    model = model_of(Outer(name="outer"))
    steps = trace(model).steps
    names = [step.name.removeprefix("outer/") for step in steps[:-1]]
    dropout = model.get_layer("outer").dropout.name
    sequential = model.get_layer("outer").body.name
    expected = ["pair/first", "pair/relu", "pair/second", dropout, f"{sequential}/inner"]
    assert names == expected
    assert [c.name for c in trace(model).composites] == ["outer", "outer/pair"]
    certificate = lip.certify(model, X, verbose=0)
    assert certificate.radii.max() > 0
    assert certificate.evidence.bound.declared == ("outer", "outer/pair")


def test_in_low_precision():
    certificate = lip.certify(model_of(Pair(dtype="mixed_bfloat16")), X, verbose=0)
    assert certificate.radii.max() > 0


def test_a_composite_on_images_of_unknown_size():
    class Images(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.shift = lip.layers.ShiftMixing(1 / 8)
            self.act = lip.layers.BetaAbs(0.5)

        def certified_parts(self):
            return (self.shift, self.act)

        def build(self, input_shape):
            self.shift.build(input_shape)

        def call(self, inputs):
            return self.act(self.shift(inputs))

    inputs = keras.Input((None, None, 8))
    x = Images()(inputs)
    x = lip.layers.NormalizedDense(3)(keras.layers.GlobalAveragePooling2D()(x))
    images = np.random.default_rng(0).normal(size=(2, 6, 6, 8)).astype("float32")
    assert lip.certify(keras.Model(inputs, x), images, verbose=0).radii.max() > 0


def test_our_block_is_one_like_any_other():
    graph = trace(small_lipnext())
    assert [c.name for c in graph.composites] == ["block_0", "block_1"]
    check_composites(graph)
    assert not composites.composite_notes(graph)


class Residual(Pair):
    def certified_parts(self):
        return (self.first, self.relu, self.second)

    def call(self, inputs):
        return inputs + super().call(inputs)


class Scaled(Pair):
    certified_parts = Pair.certified_parts

    def call(self, inputs):
        return 1.00001 * super().call(inputs)


class Swapped(Pair):
    def certified_parts(self):
        return (self.first, self.second, self.relu)

    def call(self, inputs):
        return super().call(inputs)


class Saturated(Pair):
    """As the parts on small inputs alone."""

    certified_parts = Pair.certified_parts

    def call(self, inputs):
        return super().call(keras.ops.clip(inputs, -3.0, 3.0))


@pytest.mark.parametrize(
    "cls",
    [Residual, Swapped]
    + [pytest.param(cls, marks=accelerated.of_cpus()) for cls in (Scaled, Saturated)],
)
@pytest.mark.parametrize(
    "prove",
    [
        lip.lipschitz_bound,
        lambda model: lip.certify(model, X, verbose=0),
        lip.lmi.eclipse_fast,
    ],
    ids=["lipschitz_bound", "certify", "eclipse_fast"],
)
def test_a_call_that_computes_something_else(cls, prove):
    with pytest.raises(ValueError, match=r"certified_parts`: its `call` answers otherwise"):
        prove(model_of(cls(4, name="liar")))


def test_the_comparison_alone_tells_them(monkeypatch):
    """Without it, a wrong constant would be returned: the test of the tests above."""
    model = model_of(Residual(4))
    monkeypatch.setattr("keras_lipnext.lipschitz.model.check_composites", lambda graph: None)
    assert lip.lipschitz_bound(model).constant > 0


class Inherited(Pair):
    def call(self, inputs):
        return inputs + super().call(inputs)


class InheritedCall(Pair):
    def __call__(self, inputs):
        return super().__call__(2.0 * inputs)


@pytest.mark.parametrize("cls, method", [(Inherited, "call"), (InheritedCall, "__call__")])
def test_parts_of_another_class(cls, method):
    reason = rf"its class {cls.__name__} defines another `{method}` than Pair"
    with pytest.raises(ValueError, match=reason):
        lip.lipschitz_bound(model_of(cls(4)))


def test_parts_may_be_taken_back():
    class None_(Inherited):
        certified_parts = None

        def build(self, input_shape):
            for part in (self.first, self.second):
                part.build((None, 4))

    with pytest.raises(ValueError, match="no Lipschitz constant is known for its class"):
        lip.lipschitz_bound(model_of(None_(4)))


@pytest.mark.parametrize(
    "choose, reason",
    [
        (lambda self: (), r"must be a tuple of layers. Received: \(\)"),
        (lambda self: self.first, r"must be a tuple of layers. Received: <Dense"),
        (lambda self: (self.first, keras.ops.abs), r"a part must be a layer. Received: <function"),
        (lambda self: (self.first, self.relu), r"weight '.*second.*' belongs to none of its parts"),
        (
            lambda self: (self.first, keras.layers.Conv1D(5, 1), self.second),
            r"'conv1d.*' \(Conv1D\) is not built",
        ),
    ],
    ids=["none", "a layer", "a function", "left out", "order"],
)
def test_what_is_no_composition(choose, reason):
    cls = type("Other", (Pair,), {})
    model = model_of(cls(5, name="other"))  # built as Pair is
    cls.certified_parts, cls.call = choose, Pair.call
    with pytest.raises(ValueError, match=rf"'other'.*certified_parts`: .*({reason})"):
        trace(model)


def test_parts_that_are_not_built():
    cls = type("Other", (Pair,), {"call": Pair.call})
    layer = cls(5, name="other")
    model = model_of(layer)
    late = keras.layers.Dense(5, name="late")
    cls.certified_parts = lambda self: (*Pair.certified_parts(self), late)
    with pytest.raises(ValueError, match=r"'late' \(Dense\) is not built"):
        trace(model)


def test_outputs_of_another_shape():
    cls = type("Other", (Pair,), {"call": Pair.call})
    model = model_of(cls(5, name="other"))
    flat = keras.layers.Reshape((5, 1))
    flat.build((None, 5))
    cls.certified_parts = lambda self: (*Pair.certified_parts(self), flat)
    message = r"they make outputs of shape \(None, 5, 1\), and the layer itself of \(None, 5\)"
    with pytest.raises(ValueError, match=message):
        trace(model)


@pytest.mark.parametrize("count", [1, 2])
def test_several_tensors(count):
    class Joined(Pair):
        def build(self, input_shape):
            super().build(input_shape[0])

        def call(self, inputs):
            return super().call(keras.ops.add(inputs[0], inputs[-1]))

        def certified_parts(self):
            return super().certified_parts()

        def compute_output_shape(self, input_shape):
            return super().compute_output_shape(input_shape[0])

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Joined(5)([inputs] * count))
    with pytest.raises(ValueError, match=r"takes one, not in a list, and makes one"):
        trace(model)


def test_called_by_the_arguments_name():
    inputs = keras.Input((4,))
    pair = Pair(name="pair")
    model = keras.Model(inputs, pair(inputs=inputs))
    assert [step.operation for step in trace(model).steps] == list(pair.certified_parts())


@pytest.mark.parametrize("where", ["instance", "property"])
def test_parts_as_an_attribute(where):
    """Keras' files would name the parts' weights by it: a class that gets one could load none."""
    cls = type("Plain", (keras.layers.Layer,), {})
    layer = cls()
    if where == "instance":
        layer.certified_parts = (keras.layers.ReLU(),)
    else:
        cls.certified_parts = property(lambda self: (keras.layers.ReLU(),))
    with pytest.raises(ValueError, match="make it a method, of the class whose `call` it"):
        composites.parts_of(layer)
