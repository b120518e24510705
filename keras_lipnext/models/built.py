import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import keras

from keras_lipnext.models import presets
from keras_lipnext.models.architecture import Architecture, warn_of_range
from keras_lipnext.models.certifiable import CertifiableModel
from keras_lipnext.optimizers import cosine
from keras_lipnext.report.certificate import Certificate
from keras_lipnext.typing import Config


class BuiltModel(CertifiableModel):
    """What LipNeXt and SLLNet share: a model that is saved as the arguments it was built from.

    Subclasses build the layers in `__init__`, set `_architecture` to their arguments, and define
    `compile_as_built`.
    """

    _architecture: Architecture
    _decayed = False

    # Of the package: {name: metadata}.
    presets: ClassVar[Any] = presets.Presets()

    @classmethod
    def from_preset(cls, preset: str | pathlib.Path, load_weights: bool = True) -> Self:
        """A trained model, compiled as the class compiles what it builds.

        Example:

        ```python
        model = keras_lipnext.LipNeXt.from_preset("digits_tiny")
        ```

        Args:
            preset: A name in `presets`, a folder that `save_to_preset` wrote, or "hf://owner/name",
                a repository on Hugging Face with the files of such a folder.
            load_weights: Whether to load the weights; else they are random.

        Returns:
            A model of this class. Where the preset has a certificate, it is that of its weights.

        Raises:
            ValueError: if there is no such preset, it holds another class, or weights other than
                those of its certificate.
            ImportError: for "hf://" without huggingface_hub.
            OSError: if a remote preset cannot be fetched.
        """
        return presets.load(preset, cls, load_weights)

    def save_to_preset(
        self,
        folder: str | pathlib.Path,
        certificate: Certificate | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a folder that `from_preset` reads: config, weights, metadata, certificate.

        Args:
            folder: Is made if it does not exist; files of an earlier preset are replaced.
            certificate: What `certify` answered for this model, to be kept beside it.
            metadata: What is to be known of it, in built-in types: "description", "data",
                "licence", "command" and so on.

        Raises:
            ValueError: if the certificate is of other weights, or the class is not registered.
            TypeError: if the metadata is more than JSON can hold.
        """
        presets.save(self, folder, certificate, metadata)

    def compile_as_built(self) -> None:
        """Compiles with the defaults of the class for this architecture."""
        raise NotImplementedError(f"{type(self).__name__} must define `compile_as_built()`.")

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
