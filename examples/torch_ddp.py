"""Train a LipNeXt on the PyTorch backend in several processes: DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/torch_ddp.py   # one process a device
    python examples/torch_ddp.py           # one process: the same result

`torchrun` starts processes on several machines, too. Each works on its part of every batch;
DistributedDataParallel averages the gradients, and the optimizer's steps along the manifold are
shared: each process takes those of some of the matrices, and sends the others its results.
Process 0 writes the model. On GPUs by NCCL, on CPUs by gloo.
"""

import argparse
import os
import pathlib

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
from quickstart import digits
from torch import distributed

import keras_lipnext as lip


def batches(size, steps, seed):
    """Rows of the data of each step, the same in all processes."""
    generator = np.random.default_rng(seed)
    images = len(digits()[0][0])
    for _ in range(steps):
        yield generator.choice(images, size, replace=False)


def train(arguments, process, processes):
    keras.utils.set_random_seed(arguments.seed)
    model = lip.LipNeXt(
        size="tiny", input_shape=(8, 8, 1), num_classes=10, patch_size=2, epsilon=0.5 / 3
    )
    forward = torch.nn.parallel.DistributedDataParallel(model) if processes > 1 else model
    variables, optimizer = model.trainable_variables, model.optimizer
    if processes > 1:
        optimizer.share_steps()
    (x, y), _ = digits()
    for step, batch in enumerate(batches(arguments.batch_size, arguments.steps, arguments.seed)):
        mine = np.array_split(batch, processes)[process]
        model.zero_grad()
        logits = forward(keras.ops.convert_to_tensor(x[mine]))
        loss = model.compute_loss(y=keras.ops.convert_to_tensor(y[mine]), y_pred=logits)
        loss.backward()
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in variables], variables)
        if process == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss of process 0 {float(loss.detach()):.4f}")
    optimizer.finalize_variable_values(variables)  # as `fit` does: removes rounding drift
    return model


def check_replicas(model, processes):
    """Raises unless all processes hold the same weights, bit by bit."""
    mine = torch.cat([v.value.detach().flatten() for v in model.trainable_variables])
    everyones = [torch.empty_like(mine) for _ in range(processes)]
    distributed.all_gather(everyones, mine)
    if not all(torch.equal(mine, other) for other in everyones):
        raise SystemExit("the processes' weights differ")
    print(f"{processes} processes hold the same weights")


def main(arguments):
    process, processes = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if arguments.batch_size % processes:
        raise SystemExit(f"{arguments.batch_size} images cannot be split evenly: --batch-size")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if processes > 1:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    model = train(arguments, process, processes)
    if processes > 1:
        check_replicas(model, processes)
        distributed.destroy_process_group()
    if process == 0:
        folder = pathlib.Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        model.save(folder / "model.keras")
        print(lip.certify(model, *digits()[1], epsilons=(0.1, 0.25, 0.5)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps (400)")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes (64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--output", default="runs/torch_ddp", help="folder (runs/torch_ddp)")
    main(parser.parse_args())
