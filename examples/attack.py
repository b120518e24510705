"""Attack a certified model with foolbox and the adversarial-robustness-toolbox (ART).

    KERAS_BACKEND=jax python examples/attack.py          (or torch, or tensorflow)
    python examples/attack.py --model model.keras --data data.npz     (arrays x and y)
    python examples/attack.py --samples 40 --steps 10 --restarts 1    (a quick look)

    pip install -e '.[attacks,plot]'

Certified robust accuracy (CRA) bounds the true robust accuracy from below, what survives the
attacks bounds it from above. Minimisation attacks (DDN, Brendel-Bethge) look for the closest
adversarial input, PGD and APGD (CE, DLR, targeted) for any within epsilon. Attacks run in float32
and only suggest inputs: whether the prediction changes is decided in float64, and so is the
distance, along the line back to the sample up to the boundary. Nothing is clipped to [0, 1], which
makes the attacker stronger than one confined to images; and logits are scaled up, for a 1-Lipschitz
model's are so small that the cross-entropy leads attacks astray. Exits with an error if a
prediction flips inside its certified radius. Writes a table and a plot to a folder.
"""

import argparse
import functools
import importlib.util
import pathlib
import time

import keras
import numpy as np
from quickstart import EPSILONS, digits

import keras_lipnext as lip
from keras_lipnext.installation import installing
from keras_lipnext.twin import Float64Twin

try:
    import foolbox
    import torch
except ImportError as error:
    raise SystemExit(f"This example needs: {installing('attacks,plot')}") from error

TARGETS = 9  # classes tried by targeted APGD, the likeliest first, as in AutoAttack
BATCH = 256  # samples attacked at once
MARGIN = 10  # median difference of the two largest logits that the attacks are shown
OVERSHOOT = 1.001  # crosses boundaries that float32 puts a little too near


class Closest:
    """Distance of the closest input found that changes each prediction, verified in float64.

    Attributes:
        distances: Float64, shape (n,): infinite where no attack succeeded yet.
    """

    def __init__(self, model, x, predictions):
        self.twin = Float64Twin(model)
        self.x = x.astype("float64")
        self.predictions = predictions
        self.distances = np.where(predictions < 0, 0.0, np.inf)  # -1: logits are not finite

    def offer(self, rows, candidates):
        """Verifies the `candidates` of the samples `rows` and goes back from those that break."""
        delta = OVERSHOOT * (candidates.astype("float64") - self.x[rows])
        delta = np.where(np.isfinite(delta), delta, 0)
        broken = self._flips(rows, delta)
        rows, delta = rows[broken], delta[broken]
        low, high = np.zeros(len(rows)), np.ones(len(rows))
        for _ in range(20):
            middle = (low + high) / 2
            flips = self._flips(rows, _scaled(delta, middle))
            low, high = np.where(flips, low, middle), np.where(flips, middle, high)
        moved = (self.x[rows] + _scaled(delta, high)) - self.x[rows]
        norms = np.sqrt((moved**2).sum(axis=tuple(range(1, moved.ndim))))
        self.distances[rows] = np.minimum(self.distances[rows], norms)

    def _flips(self, rows, delta):
        # Padded to a power of two: JAX compiles for each size of a batch.
        padding = [(0, (1 << len(rows).bit_length()) - len(rows))] + [(0, 0)] * (delta.ndim - 1)
        logits = self.twin(np.pad(self.x[rows] + delta, padding))[: len(rows)]
        return logits.argmax(axis=-1) != self.predictions[rows]


def _scaled(delta, factors):
    return delta * factors.reshape(-1, *[1] * (delta.ndim - 1))


class Attacks:
    """The libraries' attacks: functions of (images, labels, epsilon) that yield candidates.

    `minimising` ones look for the closest adversarial input, whatever epsilon.
    """

    def __init__(self, module, images, classes, steps, restarts):
        self.module, self.steps, self.restarts = module, steps, restarts
        # No perturbation of interest leaves these bounds.
        low, high = float(images.min()), float(images.max())
        margin = max(1.0, high - low)
        self.foolbox_model = foolbox.PyTorchModel(
            module, bounds=(low - margin, high + margin), device="cpu"
        )
        self.minimising = {"DDN": self.ddn}
        if importlib.util.find_spec("numba"):
            self.minimising["Brendel-Bethge"] = self.brendel_bethge
        else:
            print("numba is not installed: no Brendel-Bethge attack.")
        self.bounded = {"PGD": self.pgd}
        if not importlib.util.find_spec("art"):
            print("The adversarial-robustness-toolbox is not installed: no APGD attacks.")
            return
        from art.estimators.classification import PyTorchClassifier

        self.classifier = PyTorchClassifier(
            module, torch.nn.CrossEntropyLoss(), images.shape[1:], classes, device_type="cpu"
        )
        self.bounded["APGD-CE"] = functools.partial(self.apgd, loss="cross_entropy")
        if classes > 2:  # the loss divides by the difference of the first and third logit
            self.bounded["APGD-DLR"] = self.apgd
            self.bounded["APGD-T"] = self.apgd_targeted

    def ddn(self, images, labels, epsilon):
        yield self._foolbox(foolbox.attacks.DDNAttack(steps=self.steps), images, labels)

    def brendel_bethge(self, images, labels, epsilon):
        # It walks along the boundary from an adversarial input; samples without one sit it out.
        (starts,) = self.ddn(images, labels, epsilon)
        with torch.no_grad():
            usable = self.module(starts).argmax(axis=-1) != labels
        if usable.any():
            # foolbox scales the trust region by the number of values in the batch: undone here.
            low, high = self.foolbox_model.bounds
            rate = 0.1 / (images[usable].numel() * (high - low))
            attack = foolbox.attacks.L2BrendelBethgeAttack(steps=self.steps, lr=rate)
            starts[usable] = self._foolbox(
                attack, images[usable], labels[usable], starting_points=starts[usable]
            )
        yield starts

    def pgd(self, images, labels, epsilon):
        attack = foolbox.attacks.L2PGD(steps=self.steps, rel_stepsize=2.5 / self.steps)
        yield self._foolbox(attack.repeat(self.restarts), images, labels, epsilon)

    def apgd(self, images, labels, epsilon, loss="difference_logits_ratio", targeted=False):
        from art.attacks.evasion import AutoProjectedGradientDescent

        attack = AutoProjectedGradientDescent(
            self.classifier,
            norm=2,
            eps=epsilon,
            eps_step=2 * epsilon,
            max_iter=self.steps,
            targeted=targeted,
            nb_random_init=1 if targeted else self.restarts,
            batch_size=BATCH,
            loss_type=loss,
            verbose=False,
        )
        yield torch.tensor(attack.generate(images.numpy(), labels.numpy()))

    def apgd_targeted(self, images, labels, epsilon):
        with torch.no_grad():
            logits = self.module(images).scatter(1, labels[:, None], -np.inf)
        for targets in logits.argsort(dim=1, descending=True).T[:TARGETS][: logits.shape[1] - 1]:
            yield from self.apgd(images, targets, epsilon, targeted=True)

    def _foolbox(self, attack, images, labels, epsilon=None, **kwargs):
        candidates, *_ = attack(self.foolbox_model, images, labels, epsilons=epsilon, **kwargs)
        return candidates


def attack_all(attacks, images, closest, epsilons, to_model):
    """Runs all attacks; bounded ones on the samples that stand so far at each epsilon."""
    labels = torch.tensor(closest.predictions)
    jobs = [(name, attack, 0.0) for name, attack in attacks.minimising.items()]
    jobs += [(name, attack, e) for e in epsilons for name, attack in attacks.bounded.items()]
    for done, (name, attack, epsilon) in enumerate(jobs, start=1):
        start = time.perf_counter()
        standing = np.flatnonzero(closest.distances > epsilon)
        for first in range(0, len(standing), BATCH):
            rows = standing[first : first + BATCH]
            # A little inside, so that rounding in float32 does not lead beyond epsilon.
            for candidates in attack(images[rows], labels[rows], epsilon * (1 - 1e-5)):
                closest.offer(rows, to_model(candidates.numpy()))
        limit = f"within {epsilon:g}" if epsilon else "at any distance"
        broken = np.isfinite(closest.distances) & (closest.distances <= (epsilon or np.inf))
        print(
            f"[{done}/{len(jobs)}] {name}: {broken.sum()} of {len(broken)} broken {limit} so far, "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )


def attacked(model, x, predictions, epsilons, steps, restarts):
    """Distances of the closest inputs that all attacks find, and the names of these attacks.

    The distances are of shape (n,), infinite where none was found.
    """
    margins = np.diff(np.partition(model.predict(x, verbose=0), -2)[:, -2:])
    module = lip.certification.as_torch_module(model, logit_scale=MARGIN / np.median(margins))
    # Images go to the libraries channels first; vectors as they are.
    channels = -1 if x.ndim == 4 and keras.config.image_data_format() == "channels_last" else 1
    images = torch.tensor(np.moveaxis(x, channels, 1).copy())
    attacks = Attacks(module, images, model.output_shape[-1], steps, restarts)
    closest = Closest(model, x, predictions)
    attack_all(attacks, images, closest, epsilons, lambda a: np.moveaxis(a, 1, channels))
    return closest.distances, [*attacks.minimising, *attacks.bounded]


def table(certificate, distances, epsilons):
    """Both bounds of the robust accuracy, in Markdown."""
    rows = ["| epsilon | certified (CRA) | empirical |", "| ---: | ---: | ---: |"]
    for epsilon in epsilons:
        empirical = (certificate.correct & (distances > epsilon)).mean()
        rows.append(
            f"| {epsilon:g} | {certificate.certified_accuracy[epsilon]:.2%} | {empirical:.2%} |"
        )
    return "\n".join(rows)


def plot(path, certificate, distances, epsilons):
    """Both bounds of the robust accuracy against epsilon."""
    from matplotlib.figure import Figure

    edges = np.linspace(0, 1.6 * max(epsilons), 500)
    certified, empirical = (
        100 * np.array([(certificate.correct & (values > e)).mean() for e in edges])
        for values in (certificate.radii, distances)
    )
    clean = 100 * certificate.clean_accuracy
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(clean, color="0.5", linestyle=":", label=f"clean accuracy {clean:.1f} %")
    axes.plot(edges, empirical, color="black", linestyle="--", label="empirical: stands attacks")
    axes.fill_between(edges, certified, empirical, color="0.85", label="undecided")
    axes.plot(edges, certified, color="black", label="certified (CRA)")
    for epsilon in epsilons:
        axes.axvline(epsilon, color="0.7", linewidth=0.8, zorder=0)
    axes.set(
        xlabel="epsilon: l2 norm of the perturbation, in units of the inputs",
        ylabel="robust accuracy (%)",
        xlim=(0, edges[-1]),
        ylim=(0, 104),
    )
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)


def model_and_data(arguments):
    """The model to attack, its inputs, float32, and their labels."""
    if arguments.model:
        arrays = np.load(arguments.data)
        return keras.models.load_model(arguments.model), arrays["x"].astype("float32"), arrays["y"]
    (x_train, y_train), held_out = digits()
    model = lip.LipNeXt(
        size="tiny", input_shape=(8, 8, 1), num_classes=10, patch_size=2, epsilon=0.5 / 3
    )
    model.fit(x_train, y_train, batch_size=64, epochs=arguments.epochs, verbose=2)
    return model, *held_out


def main(arguments):
    keras.utils.set_random_seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    model, x, y = model_and_data(arguments)
    chosen = np.random.default_rng(arguments.seed).permutation(len(x))[: arguments.samples]
    x, y, epsilons = x[chosen], y[chosen], sorted(arguments.epsilons)

    certificate = lip.certify(model, x, y, epsilons=epsilons)
    print(f"\nAttacking {len(x)} predictions ({keras.backend.backend()} backend):")
    distances, _ = attacked(
        model, x, certificate.predictions, epsilons, arguments.steps, arguments.restarts
    )
    radii = certificate.radii
    rows = table(certificate, distances, epsilons)
    ratios = np.divide(distances, radii, out=np.full(len(radii), np.inf), where=radii > 0)
    flipped = int((ratios < 0.999).sum())
    print(
        f"\nRobust accuracy of {len(x)} samples, clean accuracy {certificate.clean_accuracy:.2%}:\n"
        f"{rows}\n"
        f"Closest adversarial input found / certified radius: {ratios.min():.4f} at the least, "
        f"{np.median(ratios):.4f} in the median.\n"
        f"Certified predictions flipped inside 0.999 of their radius: {flipped}"
    )

    folder = pathlib.Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "robust_accuracy.md").write_text(rows + "\n")
    plot(folder / "robust_accuracy.png", certificate, distances, epsilons)
    print(f"Wrote robust_accuracy.md and robust_accuracy.png to {folder.resolve()}")
    if flipped:
        raise SystemExit("A certified prediction flipped: this must never happen.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a saved Keras model, instead of the quickstart's")
    add("--data", help="its samples: .npz with x, in the model's layout, and y, integers")
    add("--epochs", type=int, default=15, help="of training the quickstart's model (15)")
    add("--samples", type=int, default=100, help="how many to attack, drawn at random (100)")
    add("--epsilons", type=float, nargs="+", default=EPSILONS, help="l2 norms (0.1 0.25 0.5)")
    add("--steps", type=int, default=50, help="of each attack (50)")
    add("--restarts", type=int, default=5, help="of PGD and APGD; targeted APGD has one (5)")
    add("--seed", type=int, default=0, help="of training, samples and attacks (0)")
    add("--output", default="runs/attack", help="folder (runs/attack)")
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.data):
        parser.error("--model and --data go together")
    main(arguments)
