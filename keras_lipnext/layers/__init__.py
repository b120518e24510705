"""1-Lipschitz layers."""

from keras_lipnext.layers.beta_abs import BetaAbs
from keras_lipnext.layers.full_shift_mixing import FullShiftMixing
from keras_lipnext.layers.group_sort import GroupSort
from keras_lipnext.layers.householder import Householder
from keras_lipnext.layers.l2_pool import L2Pool
from keras_lipnext.layers.lipnext_block import LipNeXtBlock
from keras_lipnext.layers.max_min import MaxMin
from keras_lipnext.layers.normalized_dense import NormalizedDense
from keras_lipnext.layers.orthogonal_dense import OrthogonalDense
from keras_lipnext.layers.patch_embedding import PatchEmbedding
from keras_lipnext.layers.positional_bias import PositionalBias
from keras_lipnext.layers.sandwich_dense import SandwichDense
from keras_lipnext.layers.scale import Scale
from keras_lipnext.layers.sdp_conv2d import SDPConv2D
from keras_lipnext.layers.sdp_dense import SDPDense
from keras_lipnext.layers.sdp_residual_conv2d import SDPResidualConv2D
from keras_lipnext.layers.sdp_residual_dense import SDPResidualDense
from keras_lipnext.layers.shift_mixing import ShiftMixing
from keras_lipnext.layers.spatial_shift import SpatialShift

__all__ = [
    "BetaAbs",
    "FullShiftMixing",
    "GroupSort",
    "Householder",
    "L2Pool",
    "LipNeXtBlock",
    "MaxMin",
    "NormalizedDense",
    "OrthogonalDense",
    "PatchEmbedding",
    "PositionalBias",
    "SDPConv2D",
    "SDPDense",
    "SDPResidualConv2D",
    "SDPResidualDense",
    "SandwichDense",
    "Scale",
    "ShiftMixing",
    "SpatialShift",
]
