"""The library's pipeline in ComfyUI, which gives it memory, shows its progress and can cancel it."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import comfy.model_management as management
import torch
from torch import Tensor, nn

from ..flux.attn_processor import compute_dtype
from ..flux.pipeline import InstantCharacterImg2ImgPipeline, InstantCharacterPipeline
from ..offload import GIB, Offloader, Strategy
from .hosting import HostedAdapter, HostedCharacter, load, to_patcher
from .init_image import TOKEN_SIZE, Conditioning, InitImage, Prompt
from .internals import free_memory_for_models, unload
from .latent_format import latent_format
from .progress import StepCallback

logger = logging.getLogger(__name__)


class Generated(NamedTuple):
    """The result of a run: IMAGE, [B, H, W, 3] in [0, 1], and the samples of a LATENT, [B, 16, h, w]."""

    image: Tensor
    samples: Tensor


class FluxWeights(nn.ModuleList):
    """The modules of a pipeline that stay on the GPU. ComfyUI logs the name of this class."""


class HostedPipeline:
    """A pipeline whose GPU memory ComfyUI manages. :class:`StyledPipeline` is the FLUX_PIPE made from it.

    The library's offloader plans and streams FLUX, its text encoders and the VAE. Those that stay on the GPU are one
    ``ModelPatcher`` for ComfyUI, which unloads them for other models. The character adapter is not part of the plan:
    :class:`HostedAdapter` gives it to ComfyUI.

    It runs on the device that is ComfyUI's when it is made.

    Args:
        pipeline: on the CPU, its LoRAs loaded.
        strategy: what stays on the GPU, see :meth:`CharacterPipelineMixin.enable_character_offload`.
        vram_gb: limit of GPU memory in GiB; 0 for all that ComfyUI has.
        compiled: whether to compile FLUX's blocks with ``torch.compile``.

    Attributes:
        pipeline: the pipeline.
        resident: ``ModelPatcher`` of the modules that stay on the GPU; None if there are none.
    """

    def __init__(
        self, pipeline: InstantCharacterPipeline, strategy: Strategy, vram_gb: float = 0.0, compiled: bool = False
    ) -> None:
        self.pipeline = pipeline
        self.resident: Any = None
        pipeline.set_progress_bar_config(disable=True)
        self._device = management.get_torch_device()
        self._strategy = strategy
        self._vram_gb = vram_gb
        self._compiled = compiled
        self._latent_format = latent_format(pipeline.vae)
        self._adapter: HostedAdapter | None = None
        self._resident_plan: tuple | None = None
        self._lora_strength: float | None = None

    def generate(
        self,
        character: HostedCharacter | None,
        prompt: Prompt,
        size: tuple[int, int],
        steps: int,
        seed: int,
        init: InitImage | None = None,
        batch_size: int = 1,
        *,
        lora_strength: float = 1.0,
        **settings: Any,
    ) -> Generated:
        """Generate pictures.

        Args:
            character: None for plain FLUX.
            prompt: as text or as CONDITIONING.
            size: width and height in pixels, multiples of 16; an init image has its own.
            steps: number of denoising steps, whatever ``init.denoise`` is.
            seed: of the noise, which is computed on the CPU and so the same on every machine.
            init: the picture that image-to-image starts from.
            batch_size: number of pictures; if the init image is a batch, its size is used.
            lora_strength: factor on all LoRAs of the pipeline.
            settings: other arguments of the library's pipeline.

        Raises:
            ValueError: an argument that the pipeline refuses, a text prompt without text encoders, or another
                model's latents.
            torch.OutOfMemoryError: the smallest plan needs more memory than there is.
        """
        self._check_size(size, init)
        settings |= self._prompt_settings(prompt)
        self._prepare(character)
        self._set_lora_strength(lora_strength)
        pipeline, init_settings = self._init_settings(init, steps)
        width, height = size if init is None else init.size
        callback = StepCallback(width, height, steps, self._latent_format, self._device)
        try:
            image = pipeline(
                subject_image=None if character is None else character.character,
                width=width,
                height=height,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
                return_dict=False,
                num_images_per_prompt=batch_size if init is None or init.batch_size == 1 else init.batch_size,
                callback_on_step_end=callback,
                **init_settings,
                **settings,
            )[0]
        finally:
            self.pipeline.maybe_free_model_hooks()
        return Generated(image.permute(0, 2, 3, 1).float().cpu(), callback.samples.float().cpu())

    def _check_size(self, size: tuple[int, int], init: InitImage | None) -> None:
        """Raise ``ValueError`` for a size that FLUX has not, or latents of another model, before anything is loaded."""
        if init is None and any(side % TOKEN_SIZE for side in size):
            raise ValueError(f"the picture is {size[0]} wide and {size[1]} high; expected multiples of {TOKEN_SIZE}")
        if init is None or init.samples is None:
            return
        shape, channels = list(init.samples.shape), self._latent_format.latent_channels
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"the latent is {shape}; expected [batch, {channels}, height, width]")

    def _prepare(self, character: HostedCharacter | None) -> None:
        """Set the character's adapter, plan the memory, and load the modules that stay on the GPU."""
        adapter = self._adapter if character is None else character.adapter
        if adapter is not self._adapter and adapter is not None:
            self.pipeline.disable_character_offload()  # the plan below replaces it
            self.pipeline.set_character_adapter(adapter.adapter, self._device)
            self.pipeline.adapter_host = self._adapter = adapter
        if self.pipeline.offloader is None:  # after the adapter: setting one under offload would pin the weights twice
            self._plan_memory()
        offloader = self.pipeline.offloader
        assert offloader is not None
        self._update_resident(offloader)
        plan = offloader.plan
        activation_bytes = plan.predicted_peak - plan.resident
        if self.resident:
            load(self.resident, activation_bytes)
        else:
            management.free_memory(activation_bytes, self._device)

    def _plan_memory(self) -> None:
        """Unload all of ComfyUI's models from the device, and plan for the memory that is then free."""
        management.free_memory(1e30, self._device)
        available = free_memory_for_models(self._device) / GIB
        vram_gb = min(available, self._vram_gb) if self._vram_gb else available
        plan = self.pipeline.enable_character_offload(self._strategy, vram_gb, self._device)
        logger.info("InstantCharacter's memory plan is %s", plan)
        if self._compiled:
            self.pipeline.enable_character_compile()

    def _update_resident(self, offloader: Offloader) -> None:
        """Make ``resident`` agree with the plan, which changes for larger pictures and when memory runs out."""
        resident_plan = offloader, offloader.plan.resident_components, offloader.plan.streamed
        if resident_plan == self._resident_plan:
            return
        if self.resident:
            unload(self.resident)
        modules = offloader.resident_modules()
        self.resident = to_patcher(FluxWeights(modules), self._device) if modules else None
        self._resident_plan = resident_plan

    def _set_lora_strength(self, strength: float) -> None:
        """Set the strength in every LoRA layer; it needs no other plan, and no prompt is encoded again without need."""
        names = {name for names in self.pipeline.get_list_adapters().values() for name in names}
        if names and strength != self._lora_strength:
            self.pipeline.set_adapters(sorted(names), [strength] * len(names))
            self._lora_strength = strength

    def _prompt_settings(self, prompt: Prompt) -> dict[str, Any]:
        """The pipeline's arguments for a prompt, without a negative prompt that has no effect."""
        prompts = {"": prompt.positive}
        if prompt.true_cfg > 1:
            prompts["negative_"] = prompt.negative
        settings: dict[str, Any] = {"true_cfg_scale": prompt.true_cfg}
        for prefix, value in prompts.items():
            if not isinstance(value, str):
                settings |= self._embeddings(prefix, value)
            elif None in (self.pipeline.text_encoder, self.pipeline.text_encoder_2):
                raise ValueError("this FLUX_PIPE has no text encoders: load them, or connect a CONDITIONING")
            else:
                settings[f"{prefix}prompt"] = value
        return settings

    def _embeddings(self, prefix: str, conditioning: Conditioning) -> dict[str, Any]:
        """The pipeline's arguments for a CONDITIONING of one prompt."""
        if len(conditioning) != 1 or conditioning[0][1].get("pooled_output") is None:
            raise ValueError(
                "the Sampler takes a CONDITIONING of one prompt for FLUX; for combined, timed and regional prompts use "
                "InstantCharacter Apply and KSampler"
            )
        text, extra = conditioning[0]
        pooled = extra["pooled_output"]
        self._check_embeddings(list(text.shape), list(pooled.shape))
        target = {"device": self._device, "dtype": compute_dtype(self.pipeline.transformer)}
        return {
            f"{prefix}prompt_embeds": text.to(**target),
            f"{prefix}pooled_prompt_embeds": pooled.to(**target),
        }

    def _check_embeddings(self, text: list[int], pooled: list[int]) -> None:
        """Raise ``ValueError`` for embeddings of these shapes that another model's text encoders made."""
        config = self.pipeline.transformer.config
        widths = config.joint_attention_dim, config.pooled_projection_dim
        if len(text) != 3 or pooled[:1] != text[:1] or (text[2:], pooled[1:]) != ([widths[0]], [widths[1]]):
            raise ValueError(
                f"the CONDITIONING has embeddings {text} and {pooled}; this FLUX expects [1, words, {widths[0]}] and "
                f"[1, {widths[1]}]: encode the prompt with its own text encoders"
            )

    def _init_settings(self, init: InitImage | None, steps: int) -> tuple[Any, dict[str, Any]]:
        """The pipeline to run, and its arguments for the steps and the init image."""
        if init is None:
            return self.pipeline, {"num_inference_steps": steps}
        img2img = InstantCharacterImg2ImgPipeline(**self.pipeline.components)  # the same models
        img2img.set_progress_bar_config(disable=True)
        img2img.share_character_adapter(self.pipeline)
        schedule_steps = max(int(steps / init.denoise), steps)
        strength = (steps - 1e-3) / schedule_steps  # diffusers rounds the number of skipped steps down
        if init.samples is not None:
            image = self._latent_format.process_in(init.samples)
        else:
            assert init.image is not None
            image = init.image[..., :3].expand(-1, -1, -1, 3).movedim(-1, 1)
        return img2img, {"image": image, "num_inference_steps": schedule_steps, "strength": strength}


class StyledPipeline(NamedTuple):
    """A FLUX_PIPE: a pipeline, which several FLUX_PIPEs may share, and the strength of its LoRA for this one."""

    hosted: HostedPipeline
    lora_strength: float = 1.0

    def generate(self, *args: Any, **settings: Any) -> Generated:
        """See :meth:`HostedPipeline.generate`."""
        return self.hosted.generate(*args, lora_strength=self.lora_strength, **settings)
