"""Models that train for certificates and certify themselves."""

from keras_lipnext.models.certifiable import CertifiableModel
from keras_lipnext.models.convert import Change, Conversion, convert
from keras_lipnext.models.estimate import Estimate
from keras_lipnext.models.lipnext import LipNeXt
from keras_lipnext.models.sll_net import SLLNet

__all__ = [
    "CertifiableModel",
    "Change",
    "Conversion",
    "Estimate",
    "LipNeXt",
    "SLLNet",
    "convert",
]
