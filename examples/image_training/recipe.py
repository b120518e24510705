"""What imagenet.py and mnist.py share: arguments, training, records, certificate."""

import argparse
import csv
import functools
import pathlib
import shutil
import sys

MONITOR = "val_certified_accuracy"  # what the best model is the best by
BACKUP = "backup"  # in the output folder: what an interrupted run continues from
AUGMENTATIONS = ("randaugment", "keras-cv", "basic", "none")


def parser(doc, name, **defaults):
    """Argument parser of the example `name`, with the settings of its full training."""
    defaults |= {"strength": 0.1, "seed": 0, "output": f"runs/{name}"}
    command_line = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag, help, **kwargs):
        default = defaults.get(flag[2:].replace("-", "_"))
        values = default if isinstance(default, list) else [default]
        shown = " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        shown_default = "" if default is None else f" ({shown})"
        command_line.add_argument(flag, help=help + shown_default, **kwargs)

    add("--data", "image files in class folders, or a NumPy archive: see above")
    add("--dataset", "of tensorflow-datasets", type=str)
    add("--data-dir", "where tensorflow-datasets keeps what it has prepared (its own default)")
    add("--smoke", "the whole path, small, on images made on the spot", action="store_true")
    add("--size", "of LipNeXt, named in docs/guides/sizes.md")
    add("--depth", "number of blocks, instead of the size's", type=int)
    add("--width", "number of channels, instead of the size's", type=int)
    add("--patch-size", "in pixels (LipNeXt's default)", type=int)
    add("--epsilon", "l2 radius of interest in training", type=float)
    add("--temperature", "EMMA's (LipNeXt's default)", type=float)
    add("--learning-rate", "peak, in radians a step (LipNeXt's default)", type=float)
    add("--epochs", "passes over the training images", type=int)
    add("--warmup-epochs", "of them, while the learning rate rises", type=float)
    add("--batch-size", "of all devices together", type=int)
    add("--augmentation", "of the training images", choices=AUGMENTATIONS)
    add("--strength", "RandAugment's, in [0, 1]", type=float)
    add("--ema", "average the weights, e.g. 0.9999; put in their place at the end", type=float)
    add("--dtype", "of the layers", choices=("float32", "mixed_bfloat16"))
    add("--remat", "compute blocks anew for the backward pass: less memory", action="store_true")
    add("--data-parallel", "spread batches over all devices (JAX)", action="store_true")
    add("--model-parallel", "devices to spread each matrix over (JAX)", type=int)
    add("--tensorboard", "write its logs, beside log.csv", action="store_true")
    add("--epsilons", "l2 radii to certify", type=float, nargs="+")
    add("--certify-images", "certify so many of the test images (all)", type=int)
    add("--seed", "of weights, shuffling and augmentation", type=int)
    add("--output", "folder; after an interruption give the same one again", type=str)
    command_line.set_defaults(**defaults)
    return command_line


def parse(command_line, smoke):
    """The arguments; with `--smoke` what was not given is taken from `smoke`."""
    if command_line.parse_args().smoke:
        command_line.set_defaults(**smoke)
    arguments = command_line.parse_args()
    if arguments.data_parallel and arguments.model_parallel:
        command_line.error(
            "--model-parallel N spreads batches over what N devices leave: no --data-parallel"
        )
    return arguments


def distribute(arguments):
    """Spreads what is built from now on over all devices, as the arguments say.

    Returns:
        In how many equal parts batches are split.
    """
    import keras

    import keras_lipnext as lip

    if not (arguments.data_parallel or arguments.model_parallel):
        return 1
    if keras.backend.backend() != "jax":
        raise SystemExit("--data-parallel and --model-parallel need KERAS_BACKEND=jax")
    devices, shared = keras.distribution.list_devices(), arguments.model_parallel or 1
    parts, rest = divmod(len(devices), shared)
    if rest:
        raise SystemExit(f"--model-parallel {shared} does not divide {len(devices)} devices")
    if arguments.batch_size % parts:
        raise SystemExit(
            f"--batch-size {arguments.batch_size} cannot be split evenly over {parts} devices"
        )
    if arguments.data_parallel:
        distribution = keras.distribution.DataParallel()
    else:
        mesh = keras.distribution.DeviceMesh((parts, shared), ["batch", "model"], devices)
        distribution = keras.distribution.ModelParallel(
            layout_map=lip.LipNeXt.get_layout_map(mesh), batch_dim_name="batch"
        )
    keras.distribution.set_distribution(distribution)
    return parts


def build(arguments, network):
    """A LipNeXt compiled with a warm-up and, if so asked, averages of its weights."""
    import keras_lipnext as lip

    model = lip.LipNeXt(
        **network,
        epsilon=arguments.epsilon,
        temperature=arguments.temperature,
        learning_rate=arguments.learning_rate,
    )
    chosen = model.optimizer
    model.compile(
        lip.optimizers.ManifoldMuon(
            float(chosen.learning_rate),
            euclidean_learning_rate=chosen.euclidean_learning_rate,
            schedule=lip.optimizers.cosine(arguments.warmup_epochs / arguments.epochs),
            use_ema=arguments.ema is not None,
            ema_momentum=arguments.ema or 0.99,
        ),
        loss=model.loss,
        metrics=["accuracy", lip.metrics.CertifiedAccuracy(arguments.epsilon)],
    )
    return model


def callbacks(arguments, epoch):
    """Records, and what an interrupted or spoilt training continues from."""
    import keras

    import keras_lipnext as lip

    folder = pathlib.Path(arguments.output)
    interrupted, log = (folder / BACKUP).exists(), folder / "log.csv"
    best = keras.callbacks.ModelCheckpoint(
        folder / "best.keras", MONITOR, mode="max", save_best_only=True
    )
    # A backup says that its epoch is done: it comes after what else an epoch leaves.
    chosen = [
        epoch,
        lip.callbacks.StopOnDivergence(),
        keras.callbacks.CSVLogger(log, append=interrupted),
        best,
        lip.callbacks.BackupAndRestore(
            folder / BACKUP, seed=arguments.seed, delete_checkpoint=False
        ),
    ]
    if arguments.tensorboard:
        chosen.append(keras.callbacks.TensorBoard(folder / "tensorboard"))
    if interrupted:
        chosen.insert(0, keras.callbacks.LambdaCallback(on_epoch_begin=Records(log, best)))
    return chosen


class Records:
    """Takes the records back to where the first epoch begins: later ones are made anew."""

    def __init__(self, log, best):
        self._log, self._best, self._done = log, best, False

    def __call__(self, epoch, logs=None):
        if self._done or not self._log.exists():
            return
        self._done = True
        lines = self._log.read_bytes().splitlines(keepends=True)[: 1 + epoch]  # the first: names
        self._log.write_bytes(b"".join(lines))
        values = [float(row[MONITOR]) for row in csv.DictReader(map(bytes.decode, lines))]
        self._best.best = max(values, default=None)


def summary(arguments, source, network, steps, parts):
    """What is going to happen: said before anything takes long."""
    import keras

    import keras_lipnext as lip

    takes = lip.LipNeXt.estimate(batch=arguments.batch_size, devices=parts, **network)
    lines = [
        f"{source.count('train')} images to train on, {source.count('validation')} more held out "
        f"for validation, {source.count('test')} to test, {source.classes} classes; "
        f"{arguments.epochs} epochs of {steps} steps",
        f"{takes.parameters:,} weights, {arguments.dtype}, {keras.backend.backend()} backend",
    ]
    if not arguments.model_parallel:  # of which the formulas know nothing
        lines.append(
            f"{takes.training_flops / 1e9:.3g} GFLOPs an image in training; memory of each of "
            f"{parts} device(s), by LipNeXt.estimate: {takes.peak_bytes / 1e9:.3g} GB"
        )
    return "\n".join(lines)


def run_small(arguments, side, channels, padding, flip=True):
    """`run` on images that are small, all of one size, and shifted by up to `padding` pixels."""
    from image_training import smoke, sources

    make = functools.partial(smoke.archive, side=side, channels=channels)
    with sources.opened(arguments, make) as source:
        from image_training import pipeline

        run(
            arguments,
            source,
            input_shape=(side, side, channels),
            crop=functools.partial(pipeline.random_shift, padding=padding, channels=channels),
            prepare=functools.partial(pipeline.whole, channels=channels),
            flip=flip,
        )


def run(arguments, source, input_shape, crop, prepare, flip=True):
    """Trains, certifies on the test images, once, and writes everything to `--output`.

    Args:
        source: As in sources.py.
        input_shape: Of the images that enter the model.
        crop, prepare, flip: As in `pipeline.augmentation`.
    """
    import keras

    from image_training import pipeline

    keras.utils.set_random_seed(arguments.seed)
    parts = distribute(arguments)
    folder, seen = pathlib.Path(arguments.output), sys.stdout.isatty()
    folder.mkdir(parents=True, exist_ok=True)
    augment = pipeline.augmentation(arguments.augmentation, crop, prepare, flip, arguments.strength)
    epoch, size = pipeline.Epoch(), arguments.batch_size
    train = pipeline.training(source, size, augment, arguments.seed, epoch)
    # The last batch, too, is split into equal parts: up to parts - 1 images are left out.
    held_out = source.count("validation") // parts * parts
    if not held_out:
        raise SystemExit(f"Too few training images to hold some out for each of {parts} devices")
    validation = pipeline.evaluation(source, size, prepare, held_out, "validation")
    network = {
        "size": arguments.size,
        "depth": arguments.depth,
        "width": arguments.width,
        "patch_size": arguments.patch_size,
        "input_shape": input_shape,
        "num_classes": source.classes,
        "remat": arguments.remat,
        "dtype": arguments.dtype,
    }
    print(summary(arguments, source, network, len(train), parts), flush=True)
    model = build(arguments, network)
    model.fit(
        train,
        epochs=arguments.epochs,
        validation_data=validation,
        shuffle=False,  # the data set does it
        callbacks=callbacks(arguments, epoch),
        verbose=1 if seen else 2,
    )
    model.save(folder / "model.keras")
    chosen = pipeline.evaluation(source, min(size, 256), prepare, arguments.certify_images)
    certificate = model.certify(chosen, epsilons=arguments.epsilons, verbose=int(seen))
    print(f"\nCertified on {len(certificate.radii)} test images:\n{certificate}")
    certificate.to_html(folder / "certificate.html")
    certificate.to_json(folder / "certificate.json")
    shutil.rmtree(folder / BACKUP)  # so far an interruption would have led back to here
    written = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"\nIn {folder.resolve()}: {written}")
