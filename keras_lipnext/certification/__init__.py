"""Certificates: proven Lipschitz constants, radii, reports and the attacks that check them."""

from keras_lipnext.certification.attacks import as_torch_module, pgd
from keras_lipnext.certification.bounds import LipschitzBound
from keras_lipnext.certification.certify import certify
from keras_lipnext.certification.lipschitz import lipschitz_bound
from keras_lipnext.certification.report import Certificate
from keras_lipnext.certification.rules import lipschitz_rule

__all__ = [
    "Certificate",
    "LipschitzBound",
    "as_torch_module",
    "certify",
    "lipschitz_bound",
    "lipschitz_rule",
    "pgd",
]
