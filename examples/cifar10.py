"""Train a LipNeXt on CIFAR-10, and certify it on the test images.

    KERAS_BACKEND=jax python examples/cifar10.py --smoke          (a minute, needs no data)
    KERAS_BACKEND=jax python examples/cifar10.py                  (prepared by tensorflow-datasets)
    KERAS_BACKEND=jax python examples/cifar10.py --data FILE      (an .npz: train_images, ...)

    pip install -e '.[jax,data,plot]'                    (or torch, or tensorflow)

Images are shifted by up to four pixels and flipped, values in [0, 1]. tensorflow-datasets fetches
them: the script says how. An archive holds uint8 arrays train_images (n, 32, 32, 3), train_labels
(n,), test_images, test_labels; or JPEG files one after the other, train_bytes, and where they
begin, train_offsets. What is written, and how to go on after an interruption, is as in imagenet.py.
"""

import _recipe

SMOKE = {
    "size": None,
    "depth": 2,
    "width": 64,
    "epochs": 3,
    "batch_size": 32,
}


if __name__ == "__main__":
    parser = _recipe.parser(
        __doc__,
        "cifar10",
        dataset="cifar10",
        size="small",
        epochs=100,
        warmup_epochs=0.0,
        batch_size=128,
        augmentation="basic",
        dtype="float32",
        epsilon=36 / 255,
        epsilons=[36 / 255, 72 / 255, 108 / 255],
    )
    arguments = _recipe.parse(parser, SMOKE)
    _recipe.run_small(arguments, side=32, channels=3, padding=4)
