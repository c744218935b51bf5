"""Progress bars, previews and texts on a running node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..flux.latents import unpack
from .init_image import TOKEN_SIZE


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
        latent_format: ComfyUI's, of the pipeline's latents.
        device: of the latents.

    Attributes:
        samples: after the last step, the latents as the samples of a LATENT, [B, channels, h, w].
    """

    def __init__(self, width: int, height: int, steps: int, latent_format: Any, device: torch.device) -> None:
        self.samples = torch.empty(0)
        self._tokens = (height // TOKEN_SIZE, width // TOKEN_SIZE)
        self._steps = steps
        self._bar = comfy.utils.ProgressBar(steps)
        self._format = latent_format
        self._previewer = latent_preview.get_previewer(device, self._format)
        self._channels = 4 * latent_format.latent_channels
        self._previous: Tensor | None = None

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        management.throw_exception_if_processing_interrupted()
        latents = tensors["latents"]
        self._bar.update_absolute(step + 1, self._steps, self._preview(pipeline, latents))
        self._previous = latents
        if step + 1 >= pipeline.num_timesteps:
            self.samples = self._format.process_out(unpack(latents, *self._tokens))
        return {}

    def _preview(self, pipeline: Any, latents: Tensor) -> Any:
        """A preview of the denoised picture, estimated from the velocity between the last two latents.

        There is none after the first step, nor for variants of FLUX with other latents.
        """
        if self._previewer is None or self._previous is None or latents.shape[-1] != self._channels:
            return None
        sigmas, index = pipeline.scheduler.sigmas, pipeline.scheduler.step_index
        velocity = (latents - self._previous) / (sigmas[index] - sigmas[index - 1])
        denoised = unpack(latents - sigmas[index] * velocity, *self._tokens)
        return self._previewer.decode_latent_to_preview_image("JPEG", denoised.float())
