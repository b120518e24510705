"""The command `lipnext`: certifies a model on data, shows what it is made of, lists presets."""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import os
import pathlib
import re
import shlex
import sys
import warnings

import keras
import numpy as np

from keras_lipnext import backend
from keras_lipnext.certification.certify import EPSILONS, certify
from keras_lipnext.certification.decisions import TASKS
from keras_lipnext.cli.loading import import_modules, load_data, load_model, model_file
from keras_lipnext.installation import installing
from keras_lipnext.lipschitz.bounds import METHODS
from keras_lipnext.lipschitz.model import lipschitz_bound, read, step_bounds
from keras_lipnext.lipschitz.program import ARITHMETICS
from keras_lipnext.lipschitz.rules.base import Context
from keras_lipnext.manifolds import Stiefel, stiefel
from keras_lipnext.models import presets
from keras_lipnext.report import text
from keras_lipnext.report.certificate import evidence_dict, write_json
from keras_lipnext.report.provenance import Evidence, Source, check_hash
from keras_lipnext.version import __version__

_EPILOG = """\
exit status:
  0 if the model was certified; 1 if it cannot be, or a file is missing, damaged
  or of the wrong kind; 2 for a wrong command line.

KERAS_BACKEND=jax|torch|tensorflow chooses what computes.
"""
_EXAMPLES = """\
examples:
  lipnext presets
  lipnext inspect model.keras
  lipnext certify model.keras data.npz --epsilons 36/255 --report page.html
  lipnext certify --help

"""
_CERTIFY_EXAMPLES = """\
examples:
  lipnext certify model.keras data.npz
  lipnext certify model.keras data.npz --epsilons 36/255 --report page.html
  lipnext certify model.keras images.npy --labels labels.npy --limit 1000
  lipnext certify model.keras data.npz --json all.json --samples --strict
  lipnext certify model.keras data.npz --arithmetic float32
  lipnext certify model.keras data.npz --lipschitz eclipse_fast
  lipnext certify digits_tiny digits.npz

"""
_INSPECT_EXAMPLES = """\
examples:
  lipnext inspect model.keras
  lipnext inspect model.keras --json layers.json
  lipnext inspect model.keras --import my_layers --strict

"""


_PRESETS_EXAMPLES = """\
examples:
  lipnext presets
  lipnext inspect digits_tiny
  lipnext certify digits_tiny digits.npz

"""


def main(arguments=None):
    """Runs the command.

    Args:
        arguments: List of words; None takes those of the command line.

    Returns:
        Exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["lipnext", *arguments])
    try:
        if options.run is _presets:
            print(_presets())
            return 0
        _check_targets(options)
        with _progress():
            import_modules(options.modules)
            model = load_model(options.model)
            certifiable = read(model)
        check_hash(certifiable, options.expect_hash)
        declared = options.run(model, certifiable, options)
    except (ValueError, OSError, ImportError) as error:
        return _failed(error)
    except Exception as error:  # in a layer of someone else, say
        return _failed(f"{type(error).__name__}: {error}")
    if declared and options.strict:
        return _failed("with --strict, every constant must be proven.")
    return 0


def _certify(model, certifiable, options):
    if options.report and (options.task == "multilabel" or len(model.outputs[0].shape) > 2):
        raise ValueError(
            "--report writes a page on one decision a sample, and this model makes many: write "
            "--json or --markdown."
        )
    x, y, files = load_data(
        options.data,
        certifiable.graph.input_shape,
        options.limit,
        options.x_key,
        options.y_key,
        options.labels,
    )
    if message := text.range_warning((float(x.min()), float(x.max())), options.epsilons):
        _warn(message)  # before the work; `certify` says it at its end
    with _progress() as verbose, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Inputs range from")
        certificate = certify(
            model,
            x,
            y,
            options.epsilons,
            options.batch_size,
            verbose,
            lipschitz=options.lipschitz,
            arithmetic=options.arithmetic,
            task=options.task,
            ignore_class=options.ignore_class,
        )
    certificate = dataclasses.replace(certificate, source=_source(options, files))
    declared = text.declared(certificate)
    _warn_of(declared)
    print(certificate)
    if options.json:
        certificate.to_json(options.json, options.samples)
    if options.markdown:
        pathlib.Path(options.markdown).write_text(certificate.to_markdown(), encoding="utf-8")
    if options.report:
        certificate.to_html(options.report)
    return declared


def _presets():
    """A line for each trained model of the package."""
    rows = [("preset", "weights", "data", "clean", "certified")]
    for name in presets.names():
        found = presets.described(name)
        metadata, certificate = found["metadata"], found["certificate"]
        shares = certificate["certified_accuracy"].items()
        rows.append(
            (
                name,
                f"{metadata['parameter_count']:,}",
                metadata["data"],
                f"{certificate['clean_accuracy']:.1%}",
                ", ".join(f"{share:.1%} at {float(epsilon):.3g}" for epsilon, share in shares),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def _inspect(model, certifiable, options):
    try:
        with _progress() as verbose:
            bound = lipschitz_bound(model, verbose, options.lipschitz)
    except ValueError as error:
        raise ValueError("\n".join(_refusals(certifiable)) or str(error)) from error
    source = _source(options)
    summary = {
        **evidence_dict(Evidence.of(model, certifiable, bound)),
        "class": type(model).__name__,
        "output_shape": list(model.output_shape),
        "constant": bound.constant,
        "body_constant": bound.body_constant,
        "declared": list(bound.declared),
        "source": dataclasses.asdict(source),
        "defects": _defects(certifiable),
    }
    _warn_of(bound.declared)
    print(_inspection(summary, source))
    if options.json:
        write_json(summary, options.json)
    return bound.declared


def _source(options, files=()):
    """What the report was made from, when and by which command."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Source((model_file(options.model), *files), date, options.command)


def _inspection(summary, source):
    """What `inspect` prints."""
    header = ("layer", "class", "constant", "input to here", "|W'W - I|", "")
    lines = [header]
    for layer in summary["layers"]:
        defect = summary["defects"].get(layer["name"])
        lines.append(
            (
                text.printable(layer["name"]),
                text.printable(layer["class"]),
                f"{layer['constant']:.10g}",
                f"{layer['total']:.10g}",
                "" if defect is None else f"{defect:.1e}",
                "" if layer["proven"] else "declared, not proven",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    table = [
        "  ".join(
            cell.ljust(width) if i in (0, 1, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    behind = " from input to head" if summary["head"] else ""
    facts = {
        "model": f"{summary['model']} ({summary['class']}), {summary['parameters']:,} parameters",
        "shapes": f"{tuple(summary['input_shape'])} to {tuple(summary['output_shape'])}",
        "dtype": ", ".join(summary["dtypes"]),
        "weights": f"sha256 {summary['weights_hash']}",
        "head": summary["head"] or "none: K is the constant of what makes the logits",
        "K": f"{summary['body_constant']:.10g}{behind}, {summary['how_proven']}",
        "constant": f"{summary['constant']:.10g} of the model, from input to output",
        **dict(text.source_facts(source)),
    }
    notes = [f"note: {note}" for note in summary["notes"]]
    lines = [*(f"{name:<10} {fact}" for name, fact in facts.items()), *notes, "", *table]
    return "\n".join(map(text.printable, lines))


def _defects(certifiable):
    """{layer: largest entry of |W^T W - I|} of the kernels that are to be orthonormal."""
    defects = {}
    with backend.float64_scope():
        for step in certifiable.steps:
            for weight in getattr(step.operation, "weights", ()):
                if isinstance(weight.constraint, Stiefel):
                    kernel = np.asarray(keras.ops.convert_to_numpy(weight), "float64")
                    kernel = keras.ops.convert_to_tensor(kernel, dtype="float64")
                    defect = float(stiefel.defect(kernel))
                    defects[step.name] = max(defect, defects.get(step.name, 0.0))
    return defects


def _refusals(certifiable):
    """Why the model cannot be certified, a sentence for each layer that is to blame."""
    for step in certifiable.body.steps:
        try:
            step_bounds(step, Context(step))
        except ValueError as error:
            yield str(error)


def _check_targets(options):
    """Whether the reports can be written, asked before any long computation."""
    read_from = [pathlib.Path(path) for path in options.inputs(options) if path]
    if presets.is_preset(options.model):
        read_from += presets.folder_of(options.model).iterdir()
    taken = {path.resolve(): "is read" for path in read_from}
    for path in (options.json, options.report, options.markdown):
        if path is None:
            continue
        target = pathlib.Path(path).resolve()
        if not target.parent.is_dir():
            raise ValueError(f"{path}: there is no such folder to write to.")
        if target.is_dir():
            raise ValueError(f"{path}: is a folder, not a file to write to.")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise ValueError(f"{path}: may not be written to.")
        if target in taken:
            raise ValueError(f"{path}: {taken[target]} by this command, and would be overwritten.")
        taken[target] = "is written"
    if options.samples and not options.json:
        raise ValueError("--samples adds to the JSON file: name one by --json FILE.")
    for package in ("jinja2", "matplotlib"):
        if options.report and importlib.util.find_spec(package) is None:
            raise ValueError(f"--report needs {package}: {installing('plot')}")


@contextlib.contextmanager
def _progress():
    """Sends what Keras prints to stderr: stdout is for the report. Gives the verbosity."""
    with contextlib.redirect_stdout(sys.stderr):
        yield int(sys.stderr.isatty())


def _warn_of(declared):
    if declared:
        _warn(
            f"not fully proven. The constants of {', '.join(declared)} were declared by whoever "
            "wrote these layers; if one is too small, the radii do not hold."
        )


def _warn(message):
    print(f"lipnext: WARNING: {text.printable(message)}", file=sys.stderr)


def _failed(error):
    message = "\n".join(map(text.printable, str(error).splitlines()))
    print(f"lipnext: error: {message}", file=sys.stderr)
    return 1


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _number(text):
    """A number, or a fraction as papers write radii."""
    above, stroke, below = text.partition("/")
    try:
        return float(above) / float(below) if stroke else float(above)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"expected a number or a fraction such as 36/255, got '{text}'"
        ) from None


def _hash(text):
    text = text.lower()
    if not re.fullmatch("([0-9]+:)?[0-9a-f]{64}", text):
        raise argparse.ArgumentTypeError(
            "a hash is the version of its format, a colon and 64 hexadecimal digits, "
            f"'2:0123...', got '{text}'"
        )
    return text


def _parser():
    parser = argparse.ArgumentParser(
        prog="lipnext",
        description="Certifies a model file on data, or shows what it is made of.",
        epilog=_EXAMPLES + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keras_lipnext {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "model", metavar="model.keras", help="file, as model.save writes it, or name of a preset"
    )
    common.add_argument("--json", metavar="FILE", help="write all numbers as JSON")
    common.add_argument(
        "--expect-hash", type=_hash, metavar="HASH", help="refuse a model of another hash"
    )
    common.add_argument(
        "--strict", action="store_true", help="fail if a constant is declared, not proven"
    )
    common.add_argument(
        "--lipschitz",
        choices=("product", *METHODS),
        default="product",
        help="how to bound the Lipschitz constant (product of the layers' constants)",
    )
    common.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers layers or Lipschitz rules; this runs its code",
    )
    command = commands.add_parser(
        "certify",
        parents=[common],
        help="certify predictions on data",
        description="Certifies the predictions of a model on data: prints clean and certified\n"
        "robust accuracy, the Lipschitz constant that is proven, and what is promised.",
        epilog=_CERTIFY_EXAMPLES + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "data",
        metavar="data.npz",
        help="inputs x and, optional, labels y, or x_test and y_test; or an .npy file of inputs",
    )
    command.add_argument("--x-key", metavar="NAME", help="name of the inputs in data.npz")
    command.add_argument("--y-key", metavar="NAME", help="name of the labels in data.npz")
    command.add_argument("--labels", metavar="y.npy", help="labels in a file of their own")
    command.add_argument(
        "--epsilons",
        type=_number,
        nargs="+",
        default=EPSILONS,
        metavar="E",
        help="l2 radii in units of the inputs, numbers or fractions (36/255 72/255 108/255)",
    )
    command.add_argument("--batch-size", type=_positive, default=256, metavar="N")
    command.add_argument("--limit", type=_positive, metavar="N", help="take the first N samples")
    command.add_argument(
        "--arithmetic",
        choices=ARITHMETICS,
        default="float64",
        help="what the radii hold of: the function alone (real), or programs of this type, too",
    )
    command.add_argument(
        "--task",
        choices=TASKS,
        default="multiclass",
        help="what the outputs are: classes, or independent labels",
    )
    command.add_argument(
        "--ignore-class", type=int, metavar="N", help="label of positions that do not count"
    )
    command.add_argument(
        "--samples", action="store_true", help="add each sample's prediction and radius to --json"
    )
    command.add_argument("--report", metavar="FILE", help="write an HTML page")
    command.add_argument("--markdown", metavar="FILE", help="write Markdown")
    command.set_defaults(run=_certify, inputs=lambda o: (o.model, o.data, o.labels))
    command = commands.add_parser(
        "presets",
        help="list the trained models of the package",
        description="Lists the trained models that come with the package: clean accuracy and\n"
        "certified robust accuracy on the test images of their data.",
        epilog=_PRESETS_EXAMPLES + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_presets)
    command = commands.add_parser(
        "inspect",
        parents=[common],
        help="show layers, constants and the weights' hash",
        description="Shows what a model is made of: its layers, the constant of each and how far\n"
        "its kernel is from orthonormal, the constant of the whole, and the hash of\n"
        "weights and architecture.",
        epilog=_INSPECT_EXAMPLES + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(
        run=_inspect, inputs=lambda o: (o.model,), report=None, markdown=None, samples=False
    )
    return parser
