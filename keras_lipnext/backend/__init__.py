"""Bridges to JAX, PyTorch and TensorFlow: the only folder that imports one of them.

Everything else in the package is written on `keras.ops`. What `keras.ops` does not offer is here.
"""

from keras_lipnext.backend.core import (
    assign_stacked,
    check_each,
    gradient,
    has_value,
    inference_scope,
    of_this_process,
    processes,
    replicas,
    rows,
    stacked,
    value,
    with_rows,
)
from keras_lipnext.backend.float64 import call_in_float64, float64_scope
from keras_lipnext.backend.precision import (
    check_compiler,
    float32_products,
    indirect_convolutions,
    matmul,
    on_cpu,
    reduced_float32,
)
from keras_lipnext.backend.programs import compiled, one_of, one_program
from keras_lipnext.backend.sharding import (
    check_process_group,
    devices_of,
    in_shares,
    processes_of,
    sharding_of,
)
from keras_lipnext.backend.torch_module import torch_module

__all__ = [
    "assign_stacked",
    "call_in_float64",
    "check_compiler",
    "check_each",
    "check_process_group",
    "compiled",
    "devices_of",
    "float32_products",
    "float64_scope",
    "gradient",
    "has_value",
    "in_shares",
    "indirect_convolutions",
    "inference_scope",
    "matmul",
    "of_this_process",
    "on_cpu",
    "one_of",
    "one_program",
    "processes",
    "processes_of",
    "reduced_float32",
    "replicas",
    "rows",
    "sharding_of",
    "stacked",
    "torch_module",
    "value",
    "with_rows",
]
