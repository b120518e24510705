"""Figures of a certificate. Matplotlib is imported when one is drawn."""

import numpy as np

from keras_lipnext.installation import installing

# 900 x 600 pixels; drawn small, so that text stays readable where 330 pixels are all there is.
_SIZE, _DPI = (5, 10 / 3), 180


def save(figure, target, format=None):
    """Writes a figure to a file name or a binary file."""
    figure.savefig(target, dpi=_DPI, format=format)


def accuracy_curve(certificate):
    """Certified robust accuracy against epsilon, exactly: a step down at each radius."""
    radii, labelled = certificate.radii, certificate.labels is not None
    counted = radii[certificate.correct] if labelled else radii
    label = "certified robust accuracy" if labelled else "predictions certified"
    finite = counted[np.isfinite(counted)]
    limit = max([*finite, *certificate.epsilons, 1e-12]) * 1.02
    edges = np.concatenate([[0.0], np.sort(finite), [limit]])
    counts = len(counted) - np.searchsorted(np.sort(counted), edges, side="right")
    figure, axes = _figure()
    axes.step(edges, 100 * counts / len(radii), where="post", color="black", label=label)
    if labelled:
        clean = 100 * certificate.clean_accuracy
        axes.axhline(clean, color="0.5", linestyle="--", label=f"clean accuracy {clean:.1f} %")
    shares = certificate.certified_accuracy or certificate.certified_share
    for epsilon, share in shares.items():
        axes.plot(epsilon, 100 * share, "o", color="black")
        axes.annotate(
            f"{100 * share:.1f} %",
            (epsilon, 100 * share),
            xytext=(6, 4),
            textcoords="offset points",
        )
    axes.set(
        xlabel="epsilon: l2 norm of the perturbation, in units of the inputs",
        ylabel=f"{label} (%)",
        xlim=(0, limit),
        ylim=(0, 104),
    )
    return _with_legend(figure)


def radius_histogram(certificate, bins=40):
    """How many samples have which radius; correct and wrong predictions told apart."""
    radii = certificate.radii
    finite = np.isfinite(radii)
    limit = max([*radii[finite], *certificate.epsilons, 1e-12]) * 1.02
    edges = np.linspace(0, limit, bins + 1)
    # Told apart by grey and by hatch: printers and colour-blind readers need no colour.
    solid = {"facecolor": "0.7", "edgecolor": "white"}
    hatched = {"facecolor": "white", "edgecolor": "black", "hatch": "//////"}
    if certificate.labels is None:
        parts = [("predictions", finite, solid)]
    else:
        parts = [
            ("correct", finite & certificate.correct, solid),
            ("wrong", finite & ~certificate.correct, hatched),
        ]
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
        ylabel="samples",
        xlim=(0, limit),
        ylim=(0, 1.05 * max(below.max(), 1)),
        title=f"not drawn: {infinite} with an infinite radius" if infinite else None,
    )
    return _with_legend(figure)


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Figures need matplotlib: {installing('plot')}") from error
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(color="0.9")
    return figure, axes


def _with_legend(figure):
    # Above the axes it hides no data, wherever the data is.
    figure.legend(loc="outside upper center", ncols=3, fontsize="small", frameon=False)
    return figure
