"""Figures of a certificate. Matplotlib is imported when one is drawn."""

import numpy as np

from keras_lipnext.installation import installing

# 900 x 600 pixels; drawn small, so that text stays readable where 330 pixels are all there is.
_SIZE, _DPI = (5, 10 / 3), 180
# Width and height of a label with its distance from the point, as shares of the axes.
_LABEL = (0.18, 0.1)


def save(figure, target, format=None):
    """Writes a figure to a file name or a binary file."""
    figure.savefig(target, dpi=_DPI, format=format)


def accuracy_curve(certificate):
    """Certified robust accuracy against epsilon, exactly: a step down at each radius."""
    radii, labelled = certificate.counted(certificate.radii), certificate.labels is not None
    counted = radii[certificate.counted(certificate.correct)] if labelled else radii
    label = "certified robust accuracy" if labelled else "predictions certified"
    finite = counted[np.isfinite(counted)]
    shares = certificate.certified_accuracy or certificate.certified_share
    # Room for the label of the last epsilon, to the right of its point.
    last = max(certificate.epsilons, default=0.0) / (1 - _LABEL[0])
    limit = max([*finite, last, 1e-12]) * 1.02
    edges = np.concatenate([[0.0], np.sort(finite), [limit]])
    counts = len(counted) - np.searchsorted(np.sort(counted), edges, side="right")
    figure, axes = _figure()
    axes.step(edges, 100 * counts / len(radii), where="post", color="black", label=label)
    clean = 100 * certificate.clean_accuracy if labelled else None
    if labelled:
        axes.axhline(clean, color="0.5", linestyle="--", label=f"clean accuracy {clean:.1f} %")
    for epsilon, share in shares.items():
        axes.plot(epsilon, 100 * share, "o", color="black", clip_on=False)
    for (epsilon, height), text in _labels(shares, clean, limit).items():
        axes.annotate(text, (epsilon, height), xytext=(6, 4), textcoords="offset points")
    axes.set(
        xlabel="epsilon: l2 norm of the perturbation, in units of the inputs",
        ylabel=f"{label} (%)",
        xlim=(0, limit),
        ylim=(0, 112),
        yticks=range(0, 101, 20),
    )
    return _with_legend(figure)


def _labels(shares, clean, limit):
    """{(x, y): text} of labels that meet neither a line nor each other.

    A falling curve leaves the place above and to the right of each of its points free. Labels that
    would stand on the line of clean accuracy stand above it, and where two meet the first stays.
    """
    width, height = limit * _LABEL[0], 100 * _LABEL[1]
    placed = {}
    for epsilon, share in shares.items():
        y = 100 * share
        if clean is not None and clean - y < height:
            y = clean
        if all(abs(epsilon - x) >= width or abs(y - z) >= height for x, z in placed):
            placed[epsilon, y] = f"{100 * share:.1f} %"
    return placed


def radius_histogram(certificate, bins=40):
    """How many samples have which radius; correct and wrong predictions told apart."""
    radii = certificate.counted(certificate.radii)
    finite = np.isfinite(radii)
    limit = max([*radii[finite], *certificate.epsilons, 1e-12]) * 1.02
    edges = np.linspace(0, limit, bins + 1)
    # Told apart by grey and by hatch: printers and colour-blind readers need no colour.
    solid = {"facecolor": "0.7", "edgecolor": "white"}
    hatched = {"facecolor": "white", "edgecolor": "black", "hatch": "//////"}
    if certificate.labels is None:
        parts = [("predictions", finite, solid)]
    else:
        correct = certificate.counted(certificate.correct)
        parts = [("correct", finite & correct, solid), ("wrong", finite & ~correct, hatched)]
    figure, axes = _figure()
    below = np.zeros(bins)
    for label, chosen, look in parts:
        counts, _ = np.histogram(radii[chosen], edges)
        drawn = counts > 0
        axes.bar(
            edges[:-1][drawn],
            counts[drawn],
            limit / bins,
            bottom=below[drawn],
            align="edge",
            linewidth=0.6,
            label=f"{label} ({chosen.sum()})",
            **look,
        )
        below = below + counts
    for number, epsilon in enumerate(certificate.epsilons):
        name = "epsilons" if number == 0 else None
        axes.axvline(epsilon, color="black", linestyle=":", label=name)
    infinite = len(radii) - finite.sum()
    axes.set(
        xlabel="certified radius: l2 norm, in units of the inputs",
        ylabel=f"{certificate.unit}s",
        xlim=(0, limit),
        ylim=(0, 1.05 * max(below.max(), 1)),
        title=f"not drawn: {infinite} with an infinite radius" if infinite else None,
    )
    return _with_legend(figure)


def maps(certificate, epsilon, count=4):
    """Samples in rows: input, labels, prediction, certified positions, radii.

    Classes have colours of one palette; what is not certified at epsilon is white.
    """
    samples = certificate.extremes
    if not samples or np.ndim(samples[0].radius) != 2:
        raise ValueError(
            "Maps are drawn of images, whose predictions have a height and a width. Received: "
            f"{len(samples)} samples, predictions of shape {certificate.radii.shape}"
        )
    chosen = np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int)
    labelled = certificate.labels is not None
    names = ["input", *(["label"] if labelled else []), "prediction"]
    names += [f"certified at {epsilon:.3g}", "radius"]
    figure = _blank(figsize=(1.45 * len(names) + 0.6, 1.45 * len(chosen) + 0.4))
    axes = figure.subplots(len(chosen), len(names), squeeze=False)
    ignored = getattr(certificate, "ignore_class", None)
    most = max(
        int(np.max(s.prediction if s.label is None else [s.prediction, s.label])) for s in samples
    )
    classes = {"cmap": "tab10" if most < 10 else "tab20", "vmin": -0.5}
    classes |= {"vmax": 9.5 if most < 10 else 19.5, "interpolation": "nearest"}
    finite = [s.radius[np.isfinite(s.radius)] for s in samples]
    largest = max([float(r.max(initial=0.0)) for r in finite] + [1e-12])
    for row, number in zip(axes, chosen):
        sample = samples[number]
        image = np.nan_to_num(np.asarray(sample.input, "float64"))
        low, high = image.min(initial=0.0), max(image.max(initial=0.0), 1e-12)
        shades = (image - low) / (high - low)
        shades = shades if image.shape[-1] == 3 else shades.mean(axis=-1)
        row[0].imshow(shades, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        parts = [sample.prediction, np.where(sample.radius > epsilon, sample.prediction, -1)]
        if labelled:
            parts = [np.where(sample.label == ignored, -1, sample.label), *parts]
        for axis, values in zip(row[1:], parts):
            axis.imshow(np.ma.masked_less(values, 0), **classes)
        shown = row[-1].imshow(sample.radius, cmap="viridis", vmin=0, vmax=largest)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, name in zip(axes[0], names):
        axis.set_title(name, fontsize="small")
    figure.colorbar(shown, ax=axes[:, -1], shrink=0.8)
    return figure


def _blank(**settings):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Figures need matplotlib: {installing('plot')}") from error
    return Figure(layout="constrained", **settings)


def _figure():
    figure = _blank(figsize=_SIZE)
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(color="0.9")
    return figure, axes


def _with_legend(figure):
    # Above the axes it hides no data, wherever the data is.
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return figure
