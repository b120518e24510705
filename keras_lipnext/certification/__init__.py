"""Certificates: proven Lipschitz constants, radii, reports and the attacks that check them.

What has a rule, beside `keras_lipnext.layers`, so that models of it can be certified; everything
else is refused until its constant is stated (`lipschitz_rule`):

Layers of Keras: Activation, AdaptiveAveragePooling1D, AdaptiveAveragePooling2D,
    AdaptiveAveragePooling3D, AdaptiveMaxPooling1D, AdaptiveMaxPooling2D, AdaptiveMaxPooling3D, Add,
    Average, AveragePooling1D, AveragePooling2D, AveragePooling3D, BatchNormalization, CenterCrop,
    Concatenate, Conv1D, Conv1DTranspose, Conv2D, Conv2DTranspose, Conv3D, Conv3DTranspose,
    Cropping1D, Cropping2D, Cropping3D, Dense, DepthwiseConv1D, DepthwiseConv2D, ELU, EinsumDense,
    Flatten, GlobalAveragePooling1D, GlobalAveragePooling2D, GlobalAveragePooling3D,
    GlobalMaxPooling1D, GlobalMaxPooling2D, GlobalMaxPooling3D, LeakyReLU, MaxPooling1D,
    MaxPooling2D, MaxPooling3D, Maximum, Minimum, Normalization, PReLU, Permute, ReLU, RepeatVector,
    Rescaling, Reshape, Resizing, SeparableConv1D, SeparableConv2D, Subtract, TimeDistributed,
    UpSampling1D, UpSampling2D, UpSampling3D, ZeroPadding1D, ZeroPadding2D, ZeroPadding3D.

Layers that return their input at inference: ActivityRegularization, AlphaDropout, AugMix, Dropout,
    GaussianDropout, GaussianNoise, Identity, RandAugment, RandomBrightness,
    RandomColorDegeneration, RandomColorJitter, RandomContrast, RandomElasticTransform,
    RandomErasing, RandomFlip, RandomGaussianBlur, RandomGrayscale, RandomHue, RandomInvert,
    RandomPerspective, RandomPosterization, RandomRotation, RandomSaturation, RandomSharpness,
    RandomShear, RandomTranslation, RandomZoom, SpatialDropout1D, SpatialDropout2D,
    SpatialDropout3D.

Activations, as names, functions or layers: celu, elu, gelu, hard_sigmoid, hard_silu, hard_tanh,
    leaky_relu, linear, log_sigmoid, mish, relu, relu6, selu, sigmoid, silu, soft_shrink, softplus,
    softsign, sparse_plus, sparse_sigmoid, squareplus, tanh, tanh_shrink.

Operations of keras.ops, with a tensor and a constant where they take two: abs, absolute, add, amax,
    amin, arcsinh, arctan, cast, celu, clip, concatenate, copy, cos, cumsum, divide, dot, einsum,
    elu, erf, expand_dims, fabs, flip, gelu, hard_sigmoid, hard_silu, hard_tanh, leaky_relu,
    log_sigmoid, logsumexp, matmul, max, maximum, mean, min, minimum, moveaxis, multiply, negative,
    norm, pad, relu, relu6, repeat, reshape, roll, selu, sigmoid, silu, sin, soft_shrink, softplus,
    softsign, sort, sparse_plus, sparse_sigmoid, split, squareplus, squeeze, stack, stop_gradient,
    subtract, sum, swapaxes, take, tanh, tanh_shrink, tensordot, tile, transpose, true_divide.

Slices x[:, ...], `keras.activations.relu` with arguments and `SpectralNormalization`, read as the
layer it wraps, have one, too. A softmax is left out at the end of a model, and refused inside.

A layer of your own that is the composition of its sub-layers says so by a method, and is read as
these, one after the other: each stays proven.

```python
class Pair(keras.layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras_lipnext.layers.OrthogonalDense(units)
        self.activation = keras_lipnext.layers.MaxMin()

    def build(self, input_shape):
        self.dense.build(input_shape)
        self.activation.build(self.dense.compute_output_shape(input_shape))

    def call(self, inputs):
        return self.activation(self.dense(inputs))

    def certified_parts(self):
        return (self.dense, self.activation)
```

Its own answers are compared with those of the parts on a batch of probes, and it is refused if they
differ, if it holds weights of its own, or if a subclass overrides `call` alone. That the two agree
everywhere is the word of whoever wrote the layer: reports call it declared.
"""

from keras_lipnext.certification.attacks import as_torch_module, pgd
from keras_lipnext.certification.certify import certify
from keras_lipnext.lipschitz.bounds import LipschitzBound
from keras_lipnext.lipschitz.model import lipschitz_bound
from keras_lipnext.lipschitz.rules.base import lipschitz_rule
from keras_lipnext.report.certificate import Certificate
from keras_lipnext.report.many import DenseCertificate, LabelsCertificate

__all__ = [
    "Certificate",
    "DenseCertificate",
    "LabelsCertificate",
    "LipschitzBound",
    "as_torch_module",
    "certify",
    "lipschitz_bound",
    "lipschitz_rule",
    "pgd",
]
