"""Images a second of examples/imagenet.py's input pipeline: `python benchmarks/pipeline.py`.

    python benchmarks/pipeline.py --backends jax --networks small/64/8 --seconds 20     # quick

The pipeline alone (tf.data: JPEG files of 500 x 375 pixels, as ImageNet's are on average, read,
decoded, cropped, resized, augmented, batched) against full training steps of LipNeXt on images
of that size in float32, both on this machine's cores, in turns. A pass through the pipeline is
timed whole, from nothing in its buffers to the last batch, so that nothing of it runs while the
model's step is timed. `--images` must be many: setting up a pass, once an epoch, takes as long as
some hundred images. The pipeline is the same on each backend. Writes results/pipeline.json.

Networks are size/image size/batch. Not shown: the network or disk the files come from (here they
are in the page cache), and both at once: beside an accelerator the pipeline has the cores to
itself, on cores alone it shares them with the model.
"""

import functools
import gc
import json
import pathlib
import sys
import tempfile

import measuring

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

AUGMENTATIONS = ("none", "basic", "randaugment")
HEIGHT, WIDTH = 375, 500


def files(root, count):
    """Writes `count` JPEG files of 2 classes, smooth and noisy like photographs."""
    import numpy as np
    import tensorflow as tf

    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.uniform(0, 255, (12, 16, 3))
        image = tf.image.resize(coarse, (HEIGHT, WIDTH), "bicubic").numpy()
        image += generator.normal(0, 8, image.shape)
        image = np.clip(image, 0, 255).astype("uint8")
        for part in ("train", "val"):
            folder = root / part / f"class_{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.jpg").write_bytes(tf.io.encode_jpeg(image, quality=90).numpy())


def passes(source, side, batch):
    """{augmentation: one pass through the training images}."""
    from image_training import pipeline

    crop = functools.partial(pipeline.random_resized_crop, size=side)
    prepare = functools.partial(pipeline.central_crop, size=side)

    def one(name):
        augment = pipeline.augmentation(name, crop, prepare)
        batches = pipeline.training(source, batch, augment, seed=0, epoch=pipeline.Epoch())
        return lambda: [None for _ in batches]

    return {name: one(name) for name in AUGMENTATIONS}


def measure(arguments, source, size, side, batch):
    import keras
    import numpy as np
    from training_step import TrainingStep

    import keras_lipnext as lip

    generator = np.random.default_rng(0)
    x = generator.random((batch, side, side, 3), dtype="float32")
    labels = generator.integers(0, 1000, (16, batch))
    calls = {
        "step": TrainingStep(
            lip.LipNeXt(size=size, input_shape=(side, side, 3), neck="pool"), x, labels
        ),
        **passes(source, side, batch),
    }
    timings = measuring.interleaved(calls, arguments.rounds, arguments.seconds)
    images = {name: source.count("train") // batch * batch for name in AUGMENTATIONS}
    images["step"] = batch
    return {
        "backend": keras.backend.backend(),
        "network": f"{size}/{side}/{batch}",
        "rounds": timings.count,
        "images_per_second": {
            name: round(images[name] / timings.seconds(name), 2) for name in calls
        },
        # Of the pipeline's images a second to the model's: above 1 it keeps up.
        "pipeline_over_step": {
            name: {
                key: (np.asarray(value) * images[name] / batch).round(2).tolist()
                for key, value in timings.ratio("step", name).items()
            }
            for name in AUGMENTATIONS
        },
    }


def measure_all(arguments):
    import keras
    from image_training.sources import Folders

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        files(root, arguments.images)
        for network in arguments.networks:
            row = measure(arguments, Folders(root), *network)
            print(json.dumps(row), flush=True)
            keras.backend.clear_session()
            gc.collect()


def report(arguments, rows):
    measuring.write("pipeline", {"settings": measuring.settings(arguments), "rows": rows})
    measuring.table(
        "Images a second: the training step, and the pipeline with each augmentation",
        ["backend, network", "step", *AUGMENTATIONS, "randaugment / step"],
        [
            (
                f"{row['backend']}, {row['network']}",
                *row["images_per_second"].values(),
                row["pipeline_over_step"]["randaugment"]["median"],
            )
            for row in rows
        ],
    )


def network(text):
    size, side, batch = text.split("/")
    return size, int(side), int(batch)


if __name__ == "__main__":
    parser = measuring.parser(__doc__)
    default = [network("small/224/16"), network("base/224/8")]
    parser.add_argument("--networks", type=network, nargs="+", default=default, help="see above")
    parser.add_argument("--images", type=int, default=512, help="of a pass (512)")
    parser.add_argument("--rounds", type=int, default=16, help="of a network, at most (16)")
    parser.add_argument("--seconds", type=float, default=60, help="to stop a network after (60)")
    arguments = parser.parse_args()
    if arguments.child is not None:
        measure_all(arguments)
    else:
        rows = [r for b in arguments.backends for r in measuring.child(__file__, backend=b)]
        report(arguments, rows)
