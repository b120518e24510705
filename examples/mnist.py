"""Train a LipNeXt on MNIST, and certify it on the test images.

    KERAS_BACKEND=jax python examples/mnist.py --smoke            (a minute, needs no data)
    KERAS_BACKEND=jax python examples/mnist.py                    (prepared by tensorflow-datasets)
    KERAS_BACKEND=jax python examples/mnist.py --data FILE        (an .npz: train_images, ...)

    pip install -e '.[jax,data,plot]'                    (or torch, or tensorflow)

The settings are those of benchmarks/accuracy.py, chosen on held-out images, without augmentation;
`--augmentation basic` shifts images by up to two pixels, none is ever flipped. tensorflow-datasets
fetches them: the script says how. An archive holds uint8 arrays train_images (n, 28, 28),
train_labels (n,), test_images, test_labels. What is written, and how to go on after an
interruption, is as in imagenet.py.
"""

from image_training import recipe

SMOKE = {
    "depth": 2,
    "width": 64,
    "epochs": 3,
    "batch_size": 32,
}


if __name__ == "__main__":
    parser = recipe.parser(
        __doc__,
        "mnist",
        dataset="mnist",
        depth=8,
        width=128,
        patch_size=4,
        epochs=10,
        warmup_epochs=0.0,
        batch_size=128,
        augmentation="none",
        dtype="float32",
        epsilon=0.2,
        temperature=9.0,
        learning_rate=0.008,
        epsilons=[0.1, 0.3, 0.5],
    )
    arguments = recipe.parse(parser, SMOKE)
    recipe.run_small(arguments, side=28, channels=1, padding=2, flip=False)
