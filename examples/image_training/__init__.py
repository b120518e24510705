"""What imagenet.py and mnist.py share: where images come from, their pipeline, a training run.

`sources` finds images in folders, archives or tensorflow-datasets; `pipeline` makes augmented
batches of them that follow from the seed; `recipe` trains, continues after an interruption and
certifies; `smoke` draws images for trials. `generated`, for cifar10.py, mixes generated images in.
"""
