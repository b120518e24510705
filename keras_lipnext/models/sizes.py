"""Named sizes of LipNeXt and SLLNet.

The block of LipNeXt's paper holds two channels x channels matrices; ours stores the rows of one of
them that matter, (1 + 4 * shift_ratio) channels^2 weights for the same function. `matrix_weights`
gives both counts.
"""

# "2b" doubles the paper's 1B exactly: twice the depth at the same width.
SIZES = {
    "tiny": {"depth": 8, "width": 64, "shift_ratio": 1 / 8},
    "small": {"depth": 8, "width": 256, "shift_ratio": 1 / 16},
    "base": {"depth": 32, "width": 1024, "shift_ratio": 1 / 16},
    "large": {"depth": 32, "width": 2048, "shift_ratio": 1 / 16},
    "1b": {"depth": 32, "width": 4096, "shift_ratio": 1 / 16},
    "2b": {"depth": 64, "width": 4096, "shift_ratio": 1 / 16},
}
# They end in L2 pooling, the paper's form: what replaces it was measured on small networks only.
POOLED_SIZES = ("base", "large", "1b", "2b")


def _sll(depth, width, hidden_filters, dense_depth, hidden_units):
    return {
        "depth": depth,
        "width": width,
        "hidden_filters": hidden_filters,
        "dense_depth": dense_depth,
        "hidden_units": hidden_units,
    }


SLL_SIZES = {
    "tiny": _sll(4, 16, 16, 2, 64),
    "small": _sll(20, 45, 5, 7, 2048),
    "medium": _sll(30, 60, 5, 10, 2048),
    "large": _sll(50, 90, 5, 10, 2048),
    "xlarge": _sll(70, 120, 5, 15, 2048),
}


def matrix_weights(depth, width, shift_ratio):
    """(stored, paper-equivalent) number of weights in the blocks' matrices."""
    return depth * (width + 4 * round(shift_ratio * width)) * width, 2 * depth * width**2
