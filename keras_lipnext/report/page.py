"""A certificate as one self-contained HTML page, for whoever has to judge a model file."""

import base64
import importlib.resources
import io

import numpy as np

from keras_lipnext.installation import installing
from keras_lipnext.report import plots, text

# Longer tables are folded.
_LONG = 24


def html(certificate):
    """The page, a string.

    Raises:
        ImportError: if jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(f"The page needs jinja2: {installing('plot')}") from error
    # Names of models and layers come from the file under examination: all is escaped.
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: text.printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    source = importlib.resources.files("keras_lipnext.report").joinpath("page.html")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    evidence = certificate.evidence
    return template.render(
        model=evidence.model if evidence else "an unnamed model",
        labelled=certificate.labels is not None,
        declared=", ".join(text.declared(certificate)),
        numbers=text.rows(certificate),
        explanation=text.explanation(certificate),
        promise=text.promise(certificate),
        facts=text.facts(certificate),
        classes=(text.per_class_header(certificate), text.per_class_rows(certificate)),
        layers=_layers(evidence.bound) if evidence else None,
        head=evidence.bound.head if evidence else None,
        method=evidence.bound.method.title if evidence and evidence.bound.method else None,
        k=f"{certificate.body_constant:.10g}",
        constant=f"{certificate.constant:.10g}",
        long=_LONG,
        **_figures(certificate),
        **_samples(certificate),
    )


def _figures(certificate):
    """The two figures and what they show in words."""
    shares = [f"{name}: {value}" for name, value in text.rows(certificate) if "%" in value]
    radii = certificate.radii
    return {
        "curve": _png(plots.accuracy_curve(certificate)),
        "curve_text": f"Curve of certified accuracy, falling with epsilon. {'; '.join(shares)}.",
        "histogram": _png(plots.radius_histogram(certificate)),
        "histogram_text": f"Histogram of the certified radii of {len(radii)} samples, from "
        f"{radii.min():.4g} to {radii.max():.4g}, median {np.median(radii):.4g}.",
    }


def _layers(bound):
    """Header and cells of the table of constants."""
    header = ["layer", "class", "constant", "input to here", "how known", "reads"]
    cells = [
        [
            layer.name,
            layer.kind,
            f"{layer.constant:.10g}",
            f"{layer.total:.10g}",
            _how_known(layer),
            ", ".join(layer.reads),
        ]
        for layer in bound.layers
    ]
    return header, cells


def _how_known(layer):
    if not layer.proven:
        return "declared"
    return f"proven, together with {layer.joined}" if layer.joined else "proven"


def _samples(certificate):
    """The samples of smallest and largest radii, with pictures where they are images."""
    extremes, labelled = certificate.extremes, certificate.labels is not None
    low, high = _value_range(extremes)
    samples = []
    for sample in extremes:
        wrong = labelled and sample.prediction != sample.label
        cells = [
            str(sample.index),
            f"{sample.prediction} (wrong)" if wrong else str(sample.prediction),
            *([str(sample.label)] if labelled else []),
            f"{sample.radius:.4g}",
        ]
        samples.append((cells, _picture(sample.input, low, high)))
    half = (len(samples) + 1) // 2
    return {
        "sample_header": ["sample", "predicted", *(["label"] if labelled else []), "radius"],
        "samples": [("Smallest radii", samples[:half]), ("Largest radii", samples[half:][::-1])],
        "pictured": all(picture for _, picture in samples),
        "black": f"{low:.4g}",
        "white": f"{high:.4g}",
    }


def _value_range(extremes):
    """What to draw black and white: 0 and 1, or 0 and 255, where all values lie between."""
    values = np.concatenate([np.ravel(s.input) for s in extremes] or [np.zeros(1)])
    values = values[np.isfinite(values)]
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    if low >= 0 and high <= 255:
        return 0.0, 1.0 if high <= 1 else 255.0
    return low, high


def _picture(values, low, high):
    """PNG of an image (height, width, 1 or 3) or (1 or 3, height, width); None of all else."""
    if values.ndim != 3:
        return None
    if values.shape[-1] not in (1, 3):
        values = np.moveaxis(values, 0, -1)
    if values.shape[-1] not in (1, 3):
        return None
    from PIL import Image  # matplotlib brings it

    shades = np.clip((np.nan_to_num(values) - low) / (high - low), 0, 1)
    pixels = np.round(255 * np.repeat(shades, 3 // shades.shape[-1], axis=-1)).astype("uint8")
    return _encoded(lambda file: Image.fromarray(pixels).save(file, "PNG"))


def _png(figure):
    return _encoded(lambda file: plots.save(figure, file, "png"))


def _encoded(write):
    """What `write` puts into a binary file, in base64."""
    file = io.BytesIO()
    write(file)
    return base64.b64encode(file.getvalue()).decode("ascii")
