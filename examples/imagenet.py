"""Train a LipNeXt on ImageNet, and certify it: the complete recipe.

    KERAS_BACKEND=jax python examples/imagenet.py --smoke              (a minute, needs no data)
    KERAS_BACKEND=jax python examples/imagenet.py --size base          (imagenet2012, prepared)
    KERAS_BACKEND=jax python examples/imagenet.py --data DIR           (DIR/train/CLASS/*.jpg, val)
    KERAS_BACKEND=jax python examples/imagenet.py --dataset NAME       (another of tfds)
    KERAS_BACKEND=jax python examples/imagenet.py --size 1b --model-parallel 8

    pip install -e '.[jax,data,plot]'                         (or torch, or tensorflow)

Images are cropped at random and resized, flipped, and augmented by RandAugment, values in [0, 1].
The learning rate warms up and falls along a cosine; EMMA's epsilon rises over the first half.
ImageNet for tensorflow-datasets: with an account of https://image-net.org download the two archives
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar to ~/tensorflow_datasets/downloads/manual; the
script says how to go on.

One in 20 training images is held out for validation; test images are for the certificate alone.
Writes to a folder: log.csv, best.keras (by certified accuracy in validation), model.keras, the
final one, and its certificate on the test images, certificate.html and .json. Run again after an
interruption, it goes on with the epoch that was interrupted.
"""

import functools

from image_training import recipe, smoke, sources

SMOKE = {
    "size": None,
    "depth": 2,
    "width": 64,
    "image_size": 32,
    "epochs": 4,
    "warmup_epochs": 1.0,
    "batch_size": 32,
    "epsilon": 0.1,
    "epsilons": [0.1, 0.25],
}


def main(arguments):
    with sources.opened(arguments, make=smoke.class_folders) as source:
        from image_training import pipeline

        side = arguments.image_size
        recipe.run(
            arguments,
            source,
            input_shape=(side, side, 3),
            crop=functools.partial(pipeline.random_resized_crop, size=side),
            prepare=functools.partial(pipeline.central_crop, size=side),
        )


if __name__ == "__main__":
    parser = recipe.parser(
        __doc__,
        "imagenet",
        dataset="imagenet2012",
        size="base",
        epochs=100,
        warmup_epochs=5.0,
        batch_size=1024,
        augmentation="randaugment",
        dtype="mixed_bfloat16",
        epsilon=36 / 255,
        epsilons=[36 / 255, 72 / 255, 108 / 255],
    )
    parser.add_argument("--image-size", type=int, default=224, help="in pixels (224)")
    main(recipe.parse(parser, SMOKE))
