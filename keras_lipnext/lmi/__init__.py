"""Lipschitz bounds by matrix inequalities: LipSDP and ECLipsE, proven in floating point."""

from keras_lipnext.lmi.eclipse import eclipse, eclipse_diagonal, eclipse_fast
from keras_lipnext.lmi.lipsdp import lipsdp
from keras_lipnext.lmi.local import local_lipschitz
from keras_lipnext.lmi.loop_transformation import TransformedNetwork, loop_transformation
from keras_lipnext.lmi.project import project
from keras_lipnext.lmi.result import LipschitzResult
from keras_lipnext.lmi.rs_lmi import RSLMI

__all__ = [
    "RSLMI",
    "LipschitzResult",
    "TransformedNetwork",
    "eclipse",
    "eclipse_diagonal",
    "eclipse_fast",
    "lipsdp",
    "local_lipschitz",
    "loop_transformation",
    "project",
]
