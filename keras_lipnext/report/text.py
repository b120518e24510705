"""A certificate in words: its headline numbers, what it rests on, what it promises."""

import html

import numpy as np


def rows(certificate):
    """(quantity, value) pairs of the headline numbers."""
    pairs = [("samples", str(len(certificate.radii)))]
    if certificate.unanswered:
        pairs.append(("samples without an answer, radius 0", str(certificate.unanswered)))
    pairs += certificate.headlines()
    pairs.append(("median radius", f"{np.median(certificate.counted(certificate.radii)):.4g}"))
    proof = "partly declared" if declared(certificate) else "proven"
    head = certificate.evidence.bound.head if certificate.evidence else None
    if certificate.constant == certificate.body_constant and not head:
        pairs.append(
            (f"Lipschitz constant K of the model, {proof}", _constant(certificate.constant))
        )
    else:
        pairs += [
            (f"Lipschitz constant K, input to head, {proof}", _constant(certificate.body_constant)),
            (f"Lipschitz constant, input to output, {proof}", _constant(certificate.constant)),
        ]
    allowance = certificate.error_allowance
    if allowance:
        pairs += [
            (f"error allowance E of the logits, {which}", f"{value:.2g}")
            for which, value in allowance.items()
        ]
    if certificate.low_precision_differences is not None:
        differences = str(certificate.low_precision_differences)
        pairs.append((f"predictions that differ in {low_precision(certificate)}", differences))
    if certificate.low_precision_allowances is not None:
        allowance = f"{np.median(certificate.low_precision_allowances):.2g}"
        name = f"what {low_precision(certificate)} may do to the logits, median"
        pairs.append((name, allowance))
    return pairs


def headlines(certificate, clean="clean accuracy", certified="certified robust accuracy"):
    """(quantity, value) pairs of accuracies, or of shares that are certified without labels."""
    if certificate.labels is None:
        pairs, shares, certified = [], certificate.certified_share, "share of predictions certified"
    else:
        pairs = [(clean, f"{certificate.clean_accuracy:.2%}")]
        shares = certificate.certified_accuracy
    return pairs + at_epsilons(certified, shares)


def at_epsilons(name, shares):
    """(quantity, value) pairs of {epsilon: share}."""
    return [(f"{name} at epsilon = {e:.4g}", f"{share:.2%}") for e, share in shares.items()]


def _constant(value):
    """Ten digits."""
    return f"{value:#.10g}"


def explanation(certificate):
    """What the headline shares are, as a sentence."""
    kept = "every perturbation of the input of l2 norm up to epsilon"
    if certificate.labels is None:
        return (
            f"Certified at epsilon: the share of {certificate.unit}s whose prediction, right "
            f"or wrong, provably stays the same under {kept}."
        )
    return (
        f"Certified robust accuracy (CRA) at epsilon: the share of {certificate.unit}s that are "
        f"classified correctly and provably stay so under {kept}."
    )


def printable(text):
    """Text from a model as one harmless line: no name can forge a line or steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def declared(certificate):
    """Names of the layers whose constants are declared, not proven."""
    return certificate.evidence.bound.declared if certificate.evidence else ()


def low_precision(certificate):
    """Names of the low precisions the model computes in, "bfloat16"."""
    policies = certificate.evidence.dtypes if certificate.evidence else ()
    names = [name.removeprefix("mixed_") for name in policies if "16" in name or "8" in name]
    return " and ".join(dict.fromkeys(names)) or "low precision"


def how_proven(bound):
    """How the Lipschitz constant follows from those of the layers, as half a sentence."""
    count = len(bound.layers)
    if not count:
        return "no layer in front of the head"
    layers = "1 layer" if count == 1 else f"{count} layers"
    if bound.method:
        return (
            f"{bound.method.title} over {layers}, its matrix inequality proven in float64 from the "
            f"stored weights; the layers' constants combine to {bound.product:.9g}"
        )
    # Where branches meet, constants do not simply multiply.
    branches = any(len(layer.reads) > 1 for layer in bound.layers)
    way = f"combined along the graph of {layers}" if branches else f"product over {layers}"
    if any(layer.joined for layer in bound.layers):
        way += ", batch normalisation bounded together with the linear layer in front of it"
    if bound.declared:
        return f"{way}; declared, not proven, for: {', '.join(bound.declared)}"
    return f"{way}, proven from the stored weights"


def facts(certificate):
    """(name, sentence) pairs: what the certificate rests on. Empty without evidence."""
    evidence = certificate.evidence
    if evidence is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in evidence.versions.items())
    pairs = [
        ("K", how_proven(evidence.bound)),
        (
            "model",
            f"{evidence.model}, {evidence.parameters:,} parameters, input {evidence.input_shape}",
        ),
        ("dtype", ", ".join(evidence.dtypes) or "that of its inputs"),
        ("weights", f"sha256 {evidence.weights_hash}"),
        *([("inputs", units(certificate.input_range))] if certificate.input_range else []),
        *_unanswered(certificate),
        ("evaluated", f"in float64 on {evidence.backend}, {versions}"),
        ("arithmetic", arithmetic(certificate)),
        *source_facts(certificate.source),
        *(("note", note) for note in evidence.bound.notes),
    ]
    return [(name, printable(sentence)) for name, sentence in pairs]


def arithmetic(certificate):
    """Of what the radii hold, as a sentence."""
    if certificate.arithmetic == "real":
        return "real: the radii hold of the function, not of a program that evaluates it"
    return (
        f"{certificate.arithmetic}: the radii hold of the function in real arithmetic, and of "
        f"every program that evaluates it in {certificate.arithmetic}"
    )


def source_facts(source):
    """(name, sentence) pairs: the files, the date and the command; none without a `Source`."""
    if source is None:
        return []
    files = [
        (
            f"{file.role} file",
            f"{file.name}{''.join(f', {name}' for name in file.arrays)}, sha256 {file.sha256}",
        )
        for file in source.files
    ]
    return [*files, ("made", f"{source.date} by: {source.command}")]


def _unanswered(certificate):
    count, inputs = certificate.unanswered, certificate.inputs_not_finite
    if not count:
        return []
    return [
        (
            "no answer",
            f"to {count} of {len(certificate.radii)} samples: NaN or infinity in the inputs of "
            f"{inputs}, in the logits of {count - inputs} more. Their prediction is -1, which "
            "counts as wrong, and their radius 0",
        )
    ]


def contradicted_warning(count):
    """That a program itself contradicts its certificate, of `count` samples."""
    return (
        f"The model's own answers to {count} samples are not finite, or of another class than was "
        "certified of every float32 program. They have radius 0. Something on this machine is not "
        "as docs/explanation/soundness.md takes for granted: rely on none of these radii, and "
        "report it."
    )


def range_warning(input_range, epsilons):
    """What epsilon means for inputs that leave [0, 1]; None for inputs within, or without a range.

    Args:
        input_range: (smallest, largest) entry, or None.
        epsilons: The radii of interest.
    """
    if input_range is None or (input_range[0] >= 0 and input_range[1] <= 1):
        return None
    (low, high), epsilon = input_range, max(epsilons, default=0.0)
    return (
        f"Inputs range from {low:.6g} to {high:.6g}, not within [0, 1]. Radii and epsilons are in "
        f"these units: {epsilon:.4g} here is {epsilon / ((high - low) or 1.0):.2g} of the range. "
        "Is this the scale the model was trained on, and the one you mean?"
    )


def units(input_range):
    """What an epsilon means for inputs of this range, as a sentence."""
    low, high = input_range
    return f"from {low:.6g} to {high:.6g}; radii and epsilons are in their units"


def promise(certificate):
    """What the certificate promises and what not, a tuple of paragraphs."""
    names = printable(", ".join(declared(certificate)))
    bound = "K is an upper bound proven from the weights."
    if names:
        bound = (
            f"K is an upper bound if what was declared, not proven, for {names} is true: the "
            "constants of these layers, and how they round."
        )
    paragraphs = [
        f"Promised: the function the stored weights define, in real arithmetic, {_who(certificate)}"
        " for every perturbation of the input whose l2 norm is below the "
        f"{certificate.unit}'s radius. {bound} Logits were evaluated in float64, and what rounding "
        "can have done to them, E, is subtracted."
    ]
    if certificate.arithmetic != "real":
        paragraphs[0] += (
            " So is what rounding can do to the program, at every such input: that is rounded to "
            f"{certificate.arithmetic} first; sums are taken in any order, with or without fused "
            "multiply-add; numbers round to nearest, and may be flushed to zero where they are "
            "subnormal."
        )
    if certificate.low_precision_differences is not None:
        precision = low_precision(certificate)
        paragraphs.append(
            f"The model computes in {precision}: the certificate speaks of its stored weights in "
            f"real arithmetic, not of what {precision} execution predicts; the two differ on "
            f"{certificate.low_precision_differences} of {certificate.radii.size} "
            f"{certificate.unit}s. "
            f"The program in {precision} is not certified."
        )
    less = (
        "TF32, bfloat16 or float16" if certificate.arithmetic == "float32" else "float32 or below"
    )
    paragraphs.append(
        f"Not promised: that execution in {less} predicts the same, preprocessing outside "
        "the model, or that a label is right."
    )
    return tuple(paragraphs)


def _who(certificate):
    """Whether the promise is of the function alone, or of programs, too."""
    if certificate.arithmetic == "real":
        return "keeps its prediction"
    return f"and every program that evaluates it in {certificate.arithmetic} keep its prediction"


def plain(certificate):
    """The certificate as plain text."""
    numbers, grounds = rows(certificate), facts(certificate)
    width = max(len(name) for name, _ in numbers)
    lines = [f"{name:<{width}}  {value:>12}" for name, value in numbers]
    lines += [f"{name}: {sentence}" for name, sentence in grounds]
    return "\n".join([*lines, explanation(certificate), *promise(certificate)])


def per_class_header(certificate):
    """Column names of the table of classes."""
    labelled = certificate.labels is not None
    return [
        "class" if labelled else "predicted class",
        "samples",
        *(["clean accuracy"] if labelled else []),
        *(f"{'CRA' if labelled else 'certified'}({e:.4g})" for e in certificate.epsilons),
        "median radius",
    ]


def per_class_rows(certificate):
    """Cells of the table of classes, as text."""
    return [
        [
            str(row["class"]),
            str(row["samples"]),
            *([] if row["clean_accuracy"] is None else [f"{row['clean_accuracy']:.2%}"]),
            *(f"{share:.2%}" for share in row["certified_accuracy"].values()),
            f"{row['median_radius']:.4g}",
        ]
        for row in certificate.per_class
    ]


def markdown(certificate):
    """The certificate in Markdown."""
    classes = per_class_header(certificate)
    parts = [
        _table(["quantity", "value"], rows(certificate), ["---", "---:"]),
        explanation(certificate),
        _table(classes, per_class_rows(certificate), ["---:"] * len(classes)),
        "\n".join(f"- {name}: {_cell(sentence)}" for name, sentence in facts(certificate)),
        *map(_cell, promise(certificate)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header, lines, alignment):
    return "\n".join(
        f"| {' | '.join(map(_cell, cells))} |" for cells in [header, alignment, *lines]
    )


def _cell(value):
    """Text that Markdown shows as it is: names come from the model."""
    escaped = html.escape(value, quote=False)
    for character in "\\|`*[]":
        escaped = escaped.replace(character, f"\\{character}")
    return " ".join(escaped.split())
