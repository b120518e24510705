"""Loads models, certifies them on data, trains them on: run by test_cross_backend.

python certify_file.py data.npz (model.keras result.npz)...
"""

import sys

import lean  # noqa: F401  before Keras

# isort: split
import keras
import numpy as np

import keras_lipnext as lip
from keras_lipnext.twin import Float64Twin

if __name__ == "__main__":
    data = np.load(sys.argv[1])
    for model_file, result_file in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        model = keras.models.load_model(model_file)
        certificate = lip.certify(model, data["x"], data["y"], verbose=0)
        weights_hash = certificate.evidence.weights_hash
        logits = Float64Twin(model)(data["x"])
        iterations = int(model.optimizer.iterations)
        loss = model.fit(data["x"], data["y"], batch_size=64, verbose=0).history["loss"]
        np.savez(
            result_file,
            radii=certificate.radii,
            predictions=certificate.predictions,
            body_constant=certificate.body_constant,
            logits=logits,
            allowances=certificate.error_allowances,
            weights_hash=weights_hash,
            iterations=iterations,
            loss=loss,
            backend=keras.backend.backend(),
        )
