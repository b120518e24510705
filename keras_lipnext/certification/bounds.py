"""A model's Lipschitz bound as an answer, and the methods that find one."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to bound the Lipschitz constant of a model's body other than layer by layer.

    Attributes:
        title: As reports name it.
        function: From a model to a proven upper bound, a float; it raises where there is none.
    """

    title: str
    function: object


# By the names that `certify(..., lipschitz=name)` takes. `keras_lipnext.lmi` adds its own.
METHODS = {}


def method_named(name):
    """The `Method` of this name, None for "product"; ValueError if there is none."""
    if name == "product":
        return None
    if name not in METHODS:
        raise ValueError(
            f"`lipschitz` must be one of {', '.join(['product', *METHODS])}. "
            f"Received: lipschitz={name!r}"
        )
    return METHODS[name]


@dataclasses.dataclass(frozen=True)
class LayerConstant:
    """Lipschitz constant of one step of a model.

    Attributes:
        name: Path of the layer, "block_0/dense".
        kind: Name of its class.
        constant: Of the layer alone.
        total: Of everything from the model's input to the layer's output.
        proven: Whether the constant follows from the stored weights by a rule of this library.
            If not, it was declared by whoever wrote the layer.
        reads: Names of the layers whose outputs it reads; "input" is the model's input.
    """

    name: str
    kind: str
    constant: float
    total: float
    proven: bool
    reads: tuple


@dataclasses.dataclass(frozen=True)
class LipschitzBound:
    """Upper bound of the l2 Lipschitz constant of a model's body, everything before the head.

    Attributes:
        constant: Float, rounded up.
        layers: Tuple of `LayerConstant`, in the order of evaluation.
        head: Name of the linear layer that makes the logits, or None; then `constant` covers the
            logits.
        notes: Tuple of sentences on what was read in a special way.
        method: How `constant` was found: "product" of the layers' constants along the graph, or a
            name of `METHODS`.
    """

    constant: float
    layers: tuple
    head: str | None
    notes: tuple = ()
    method: str = "product"

    @property
    def product(self):
        """What the layers' constants combine to along the graph; `constant` unless by a method."""
        if self.method == "product":
            return self.constant
        return self.layers[-1].total if self.layers else 1.0

    @property
    def declared(self):
        """Names of the layers whose constants are declared, not proven."""
        return tuple(layer.name for layer in self.layers if not layer.proven)

    def __str__(self):
        width = max([len(layer.name) for layer in self.layers], default=5)
        kinds = max([len(layer.kind) for layer in self.layers], default=5)
        lines = [f"{'layer':<{width}}  {'class':<{kinds}}  {'constant':>15}  {'input to here':>15}"]
        for layer in self.layers:
            several = f"  reads {', '.join(layer.reads)}" if len(layer.reads) > 1 else ""
            declared = "" if layer.proven else "  declared, not proven"
            lines.append(
                f"{layer.name:<{width}}  {layer.kind:<{kinds}}  {layer.constant:>15.12g}  "
                f"{layer.total:>15.12g}{several}{declared}"
            )
        method = "" if self.method == "product" else f", by {METHODS[self.method].title}"
        lines.append(f"Lipschitz constant of the body: {self.constant:.12g}{method}")
        lines.append(f"head: {self.head or 'none: the constant covers the logits'}")
        return "\n".join([*lines, *self.notes])
