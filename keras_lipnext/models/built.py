from collections.abc import Mapping
from typing import Any, Self

import keras

from keras_lipnext.models.architecture import Architecture, warn_of_range
from keras_lipnext.models.certifiable import CertifiableModel
from keras_lipnext.optimizers import cosine
from keras_lipnext.typing import Config


class BuiltModel(CertifiableModel):
    """What LipNeXt and SLLNet share: a model that is saved as the arguments it was built from.

    Subclasses build the layers in `__init__`, and set `_architecture` to their arguments.
    """

    _architecture: Architecture
    _decayed = False

    def _parts(self) -> dict[str, keras.layers.Layer]:
        """{path: layer} of what can be frozen by itself."""
        return {layer.name: layer for layer in self.layers}

    def fit(self, x: Any = None, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        """Trains, as `keras.Model.fit`; warns once of images that leave [0, 1]."""
        warn_of_range(x, self._architecture.epsilon)
        return super().fit(x, *args, **kwargs)

    def get_config(self) -> Config:
        frozen = [path for path, part in self._parts().items() if not part.trainable]
        return {"name": self.name, **self._architecture.config(), "frozen": frozen}

    @classmethod
    def from_config(cls, config: Config, custom_objects: Mapping[str, Any] | None = None) -> Self:
        config = dict(config)
        frozen, decayed = config.pop("frozen", ()), config.pop("cosine_decay", False)
        # What the model was compiled with is saved, and restored, apart from its config.
        model = cls(**config, compile=False)
        for path, part in model._parts().items():
            if path in frozen:
                part.trainable = False
        model._decayed = decayed
        return model

    def compile_from_config(self, config: Config) -> None:
        super().compile_from_config(config)
        if self._decayed:  # in files from before optimizers had schedules the model has the cosine
            self._stepping_optimizer.schedule = cosine()
