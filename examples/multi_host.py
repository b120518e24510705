"""Train one LipNeXt in several processes, on one machine or on several, with keras.distribution.

    python examples/multi_host.py --processes 2                  # both on this machine

    python examples/multi_host.py --processes 2 --coordinator 10.0.0.1:4321 --process-id 0
    python examples/multi_host.py --processes 2 --coordinator 10.0.0.1:4321 --process-id 1

On several machines the same command runs on each, with the address of process 0 and an id of its
own. Each process reads its part of every batch and works on it with the devices it has; gradients
are summed by JAX. All processes draw the same order, so the result does not depend on their number,
up to rounding. Process 0 certifies the model on held-out digits and writes the files. JAX only.

With `--checkpoints`, a folder that all machines share, a training that was killed goes on when it
is started again (`pip install -e '.[checkpoints]'`).
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from quickstart import EPSILONS, digits

import keras_lipnext as lip


class Shard(keras.utils.PyDataset):
    """One process's rows of each batch, in an order that is new in each epoch, and the same in all.

    The order is drawn from NumPy's global generator, which has the same seed in all processes. Only
    batches of full size: they are split evenly over all devices.
    """

    def __init__(self, x, y, batch_size, process, processes):
        super().__init__()
        if batch_size % processes:
            raise SystemExit(f"{batch_size} images cannot be split evenly: --batch-size")
        self.x, self.y, self.batch_size = x, y, batch_size
        local = batch_size // processes
        self.mine = slice(process * local, (process + 1) * local)

    def __len__(self):
        return len(self.x) // self.batch_size

    def on_epoch_begin(self):
        self.order = np.random.permutation(len(self.x))

    def __getitem__(self, index):
        batch = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.x[batch[self.mine]], self.y[batch[self.mine]]


def network():
    return lip.LipNeXt(
        size="tiny", input_shape=(8, 8, 1), num_classes=10, patch_size=2, epsilon=0.5 / 3
    )


def train(arguments):
    process = arguments.process_id or 0
    if arguments.processes > 1:  # before anything is computed
        keras.distribution.initialize(arguments.coordinator, arguments.processes, process)
    # The same seed in all processes: each makes the same model and keeps a copy.
    keras.utils.set_random_seed(arguments.seed)
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    (x, y), (x_test, y_test) = digits()
    shard = Shard(x, y, arguments.batch_size, process, arguments.processes)
    callbacks = []
    if arguments.checkpoints:
        callbacks.append(lip.callbacks.OrbaxCheckpoint(arguments.checkpoints, arguments.seed))
    model = network()
    history = model.fit(
        shard,
        epochs=arguments.epochs,
        shuffle=False,
        callbacks=callbacks,
        verbose=0 if process else 2,
    ).history

    weights = model.get_weights()
    keras.distribution.set_distribution(None)
    if process == 0:
        # A model of this process alone: the others take no part in what follows.
        model = network()
        model.set_weights(weights)
        certificate = lip.certify(model, x_test, y_test, epsilons=EPSILONS)
        print(certificate)
        folder = pathlib.Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / "model.keras")
        (folder / "history.json").write_text(json.dumps(history, indent=1))
        (folder / "certificate.md").write_text(certificate.to_markdown())
        print(f"{arguments.processes} processes; wrote {folder.resolve()}")


def start(processes):
    """Starts all processes on this machine; ends all when one fails. Their exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", address, "--process-id"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(processes)]
    try:
        while any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            time.sleep(0.1)
        return max(abs(p.poll() or 0) for p in running)
    finally:
        for p in running:
            p.terminate()  # nothing to one that has ended
            p.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="of all machines together (2)")
    parser.add_argument("--coordinator", help="host:port of process 0; none: all run here")
    parser.add_argument("--process-id", type=int, help="of this process, from 0")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the data (40)")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes (64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (0)")
    parser.add_argument("--output", default="runs/multi_host", help="folder (runs/multi_host)")
    parser.add_argument("--checkpoints", help="folder to continue from after an interruption")
    arguments = parser.parse_args()
    if (arguments.coordinator is None) != (arguments.process_id is None):
        parser.error("--coordinator and --process-id belong together")
    if arguments.processes > 1 and arguments.process_id is None:
        sys.exit(start(arguments.processes))
    train(arguments)
