"""Progress bars, previews and texts on a running node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from .init_image import LATENT_CHANNELS


def progress() -> Callable[[int, int], None]:
    """The running node's progress bar, as a function of the amount done and the total.

    The function raises ComfyUI's ``InterruptProcessingException`` if the user has cancelled.
    """
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def show_text(node: Any, text: str) -> None:
    """Show a text on the running node of this class. It does nothing for a prompt that no page queued."""
    if node.hidden and node.hidden.unique_id:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


class StepCallback:
    """A diffusers ``callback_on_step_end``: updates progress bar and preview, cancels, and keeps the last latents.

    Args:
        width: of the picture in pixels.
        height: of the picture in pixels.
        steps: number of denoising steps.

    Attributes:
        samples: after the last step, the latents as the samples of a LATENT, [B, 16, h, w].
    """

    def __init__(self, width: int, height: int, steps: int) -> None:
        self.samples = torch.empty(0)
        self._size = (height, width)
        self._steps = steps
        self._bar = comfy.utils.ProgressBar(steps)
        self._format = comfy.latent_formats.Flux()
        self._previewer = latent_preview.get_previewer(management.get_torch_device(), self._format)
        self._previous: Tensor | None = None

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        management.throw_exception_if_processing_interrupted()
        latents = tensors["latents"]
        self._bar.update_absolute(step + 1, self._steps, self._preview(pipeline, latents))
        self._previous = latents
        if step + 1 >= pipeline.num_timesteps:
            self.samples = self._format.process_out(self._unpack(pipeline, latents))
        return {}

    def _preview(self, pipeline: Any, latents: Tensor) -> Any:
        """A preview of the denoised picture, estimated from the velocity between the last two latents.

        There is none after the first step, nor for variants of FLUX with other latents.
        """
        if self._previewer is None or self._previous is None or latents.shape[-1] != 4 * LATENT_CHANNELS:
            return None
        sigmas, index = pipeline.scheduler.sigmas, pipeline.scheduler.step_index
        velocity = (latents - self._previous) / (sigmas[index] - sigmas[index - 1])
        denoised = self._unpack(pipeline, latents - sigmas[index] * velocity)
        return self._previewer.decode_latent_to_preview_image("JPEG", denoised.float())

    def _unpack(self, pipeline: Any, latents: Tensor) -> Tensor:
        """FLUX's image tokens, [B, S, 64], as latents, [B, 16, h, w]."""
        return pipeline._unpack_latents(latents, *self._size, pipeline.vae_scale_factor)  # flux.latents.unpack
