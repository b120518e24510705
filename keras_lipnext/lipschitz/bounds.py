"""A model's Lipschitz bound as an answer, and the methods that find one."""

import dataclasses
import pkgutil


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to bound the Lipschitz constants of a model other than layer by layer.

    Attributes:
        name: As code names it.
        title: As reports name it.
        function: From a model to (constant, body_constant, pairs), proven upper bounds: a float
            from its input to its logits, one for its body, and one of z_i - z_j for each pair of
            logits, shape (classes, classes), infinite where unknown. It raises where there is none.
        local: From a model to a function of a batch's inputs, logits, allowances E_ij, predictions
            and radii by these constants (and what to add to constants of z_i - z_j, if anything),
            that answers with radii from constants of the ball around each input, none smaller. None
            if the method knows only one constant for all inputs.
    """

    name: str
    title: str
    function: object = None
    local: object = None


# The functions of `keras_lipnext.lmi` whose names the command line takes, and code may.
METHODS = ("eclipse_fast", "eclipse_diagonal", "eclipse", "lipsdp", "local_lipschitz")


def method_of(lipschitz):
    """The `Method` of a function of `keras_lipnext.lmi`, its name or a `LipschitzResult`.

    They hold it as `certifying`; a name is looked up when it is asked for, since what it stands for
    is built on this room. None for "product"; ValueError for anything else.
    """
    if isinstance(lipschitz, str) and lipschitz == "product":
        return None
    named = isinstance(lipschitz, str) and lipschitz in METHODS
    bound = pkgutil.resolve_name(f"keras_lipnext.lmi:{lipschitz}") if named else lipschitz
    method = getattr(bound, "certifying", None)
    if isinstance(method, Method):
        return method
    raise ValueError(
        f"`lipschitz` must be one of {', '.join(['product', *METHODS])}, or a LipschitzResult, or "
        f"one of the functions of these names in keras_lipnext.lmi. Received: "
        f"lipschitz={lipschitz!r}"
    )


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
        joined: Name of the linear layer that a batch normalisation follows and was bounded together
            with: `total` is then less than `constant` times the total there. Empty otherwise.
    """

    name: str
    kind: str
    constant: float
    total: float
    proven: bool
    reads: tuple
    joined: str = ""


@dataclasses.dataclass(frozen=True)
class LipschitzBound:
    """Upper bounds of the l2 Lipschitz constants of a model, and of its body.

    The body is all in front of the head, the linear layer that makes the logits. Radii follow from
    `body_constant` and the distances of the head's weight vectors, which is tighter.

    Attributes:
        constant: Float, rounded up: from the model's input to its output, the head included.
        body_constant: Float, rounded up: from the model's input to the head's, K in certificates.
            The same as `constant` if there is no head.
        layers: Tuple of `LayerConstant` of the body, in the order of evaluation.
        head: Name of the linear layer that makes the logits, or None.
        notes: Tuple of sentences on what was read in a special way.
        method: The `Method` that found the constants; None if they are the layers', combined along
            the graph. Without its functions: what is found can be pickled.
        composites: Names of the layers that count as the parts that their author declares.
    """

    constant: float
    body_constant: float
    layers: tuple
    head: str | None
    notes: tuple = ()
    method: Method | None = None
    composites: tuple[str, ...] = ()

    @property
    def product(self) -> float:
        """What the body's layers combine to; `body_constant` unless by a method."""
        if self.method is None:
            return self.body_constant
        return self.layers[-1].total if self.layers else 1.0

    @property
    def declared(self) -> tuple[str, ...]:
        """Names of the layers whose constants, or parts, are declared, not proven."""
        own = tuple(layer.name for layer in self.layers if not layer.proven)
        return own + self.composites

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=5)
        kinds = max([len(layer.kind) for layer in self.layers], default=5)
        lines = [f"{'layer':<{width}}  {'class':<{kinds}}  {'constant':>15}  {'input to here':>15}"]
        for layer in self.layers:
            several = f"  reads {', '.join(layer.reads)}" if len(layer.reads) > 1 else ""
            declared = "" if layer.proven else "  declared, not proven"
            joined = f"  bounded together with {layer.joined}" if layer.joined else ""
            lines.append(
                f"{layer.name:<{width}}  {layer.kind:<{kinds}}  {layer.constant:>15.12g}  "
                f"{layer.total:>15.12g}{several}{declared}{joined}"
            )
        method = "" if self.method is None else f", by {self.method.title}"
        if self.head:
            lines.append(f"from the input to head '{self.head}': {self.body_constant:.12g}{method}")
        lines.append(f"of the model, input to output: {self.constant:.12g}{method}")
        return "\n".join([*lines, *self.notes])
