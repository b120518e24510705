"""What an accelerator's roundings do to certified accuracy, shown on a CPU.

    KERAS_BACKEND=jax python benchmarks/rounded_products.py [--seeds 0 1 2 ...]

The quickstart's training, as it is and with operands of products rounded as an accelerator would
(tests/accelerated.py): to TF32 those of the model, forward and backward, and of the optimizer's
increments, to bfloat16 those of its directions. Of each seed: certified accuracy of the 360
held-out digits, the kernels' defect, and K - 1 of the network, and were it of 32 kernels, not 19.
In results/rounded_products.json.

A held-out digit is 0.28 points, and trainings drift apart from the first rounding on, as they do
with another order of sums: only the mean of seeds says something.
"""

import os
import pathlib
import sys

os.environ.setdefault("XLA_FLAGS", "")  # the tests' do not optimize

import keras
import measuring
import numpy as np
import pytest

import keras_lipnext as lip
from keras_lipnext.manifolds import Stiefel, stiefel

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import accelerated  # noqa: E402
import quickstart  # noqa: E402


def trained(seed, epochs, rounding):
    """What a training comes to; certified on the CPU, without rounding."""
    keras.utils.set_random_seed(seed)
    (x, y), (x_test, y_test) = quickstart.digits()
    with pytest.MonkeyPatch.context() as patch:
        if rounding:
            accelerated.round_products(patch)
        model = lip.LipNeXt(
            size="tiny", input_shape=(8, 8, 1), num_classes=10, patch_size=2, epsilon=0.5 / 3
        )
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    certificate = model.certify(x_test, y_test, epsilons=quickstart.EPSILONS, verbose=0)
    kernels = [v for v in model.trainable_variables if isinstance(v.constraint, Stiefel)]
    excess = certificate.body_constant - 1
    return {
        "seed": seed,
        "rounded": rounding,
        "clean": certificate.clean_accuracy,
        "cra": {f"{e:g}": v for e, v in certificate.certified_accuracy.items()},
        "defect": max(float(stiefel.defect(v)) for v in kernels),
        "excess": excess,
        "excess_of_32_kernels": excess / len(kernels) * 32,
    }


def main():
    parser = measuring.parser(__doc__, ())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        for rounding in (False, True):
            rows.append(trained(seed, arguments.epochs, rounding))
            print(rows[-1], flush=True)
    differences = {
        e: 100 * float(np.mean([r["cra"][e] * (1 if r["rounded"] else -1) for r in rows]) * 2)
        for e in rows[0]["cra"]
    }
    print(f"points of certified accuracy gained by rounding: {differences}")
    settings = measuring.settings(arguments)
    backend = keras.backend.backend()
    found = {"backend": backend, "settings": settings, "rows": rows, "points": differences}
    measuring.write("rounded_products", found)


if __name__ == "__main__":
    main()
