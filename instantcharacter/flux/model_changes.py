"""The methods of diffusers' FLUX pipelines that change their models, also for models that are offloaded."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .fp8 import check_fusible, check_savable

if TYPE_CHECKING:
    from diffusers import FluxPipeline as _Pipeline
else:
    _Pipeline = object


class ModelChangesMixin(_Pipeline):
    """Wraps each method that adds, removes or moves weights; arguments and results are the diffusers pipeline's."""

    @abstractmethod
    def models_changing(self) -> AbstractContextManager[None]:
        """Context manager in which the models may be changed."""

    def load_lora_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Load a LoRA."""
        with self.models_changing():
            return super().load_lora_weights(*args, **kwargs)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Remove all LoRAs."""
        with self.models_changing():
            return super().unload_lora_weights(*args, **kwargs)

    def delete_adapters(self, *args: Any, **kwargs: Any) -> Any:
        """Remove LoRAs by name."""
        with self.models_changing():
            return super().delete_adapters(*args, **kwargs)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """Merge LoRAs into the weights.

        Raises:
            ValueError: the weights are in 8 bits.
        """
        check_fusible(self.transformer)
        with self.models_changing():
            return super().fuse_lora(*args, **kwargs)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> Any:
        """Undo :meth:`fuse_lora`."""
        with self.models_changing():
            return super().unfuse_lora(*args, **kwargs)

    def set_lora_device(self, *args: Any, **kwargs: Any) -> Any:
        """Move LoRAs to a device."""
        with self.models_changing():
            return super().set_lora_device(*args, **kwargs)

    def load_textual_inversion(self, *args: Any, **kwargs: Any) -> Any:
        """Add embeddings to the text encoders."""
        with self.models_changing():
            return super().load_textual_inversion(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the pipeline as a diffusers folder.

        Raises:
            ValueError: FLUX computes in 8 bits.
        """
        check_savable(self.transformer)
        return super().save_pretrained(*args, **kwargs)

    def unload_textual_inversion(self, *args: Any, **kwargs: Any) -> Any:
        """Undo :meth:`load_textual_inversion`."""
        with self.models_changing():
            return super().unload_textual_inversion(*args, **kwargs)
