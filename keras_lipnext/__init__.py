"""1-Lipschitz neural networks that come with a proof, on TensorFlow, JAX and PyTorch."""

import keras_lipnext.installation  # noqa: F401  (before Keras: looks for its backend)
from keras_lipnext import (
    callbacks,
    certification,
    guarantees,
    layers,
    lmi,
    losses,
    manifolds,
    metrics,
    models,
    optimizers,
)
from keras_lipnext.certification import Certificate, certify, lipschitz_bound
from keras_lipnext.guarantees import enclose
from keras_lipnext.models import CertifiableModel, Conversion, LipNeXt, SLLNet, convert
from keras_lipnext.version import __version__

__all__ = [
    "CertifiableModel",
    "Certificate",
    "Conversion",
    "LipNeXt",
    "SLLNet",
    "__version__",
    "callbacks",
    "certification",
    "certify",
    "convert",
    "enclose",
    "guarantees",
    "layers",
    "lipschitz_bound",
    "lmi",
    "losses",
    "manifolds",
    "metrics",
    "models",
    "optimizers",
]
