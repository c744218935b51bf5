"""The library's pipeline as a FLUX_PIPE: ComfyUI gives it room, shows how far it is, and can cancel it."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeAlias

import comfy.latent_formats
import comfy.model_management as management
import comfy.utils
import latent_preview
import torch
from torch import Tensor, nn

from ..flux.attn_processor import compute_dtype
from ..flux.latents import unpack
from ..flux.pipeline import InstantCharacterImg2ImgPipeline, InstantCharacterPipeline
from ..offload import GIB, Strategy
from .hosting import HostedAdapter, HostedCharacter, hosted, load, release
from .values import images

logger = logging.getLogger(__name__)

Conditioning: TypeAlias = list[Any]
LATENT_CHANNELS = 16


class Prompt(NamedTuple):
    """What to draw, in words or as a CONDITIONING; the negative one counts where ``true_cfg`` is above 1."""

    positive: str | Conditioning
    negative: str | Conditioning = ""
    true_cfg: float = 1.0


class InitImage(NamedTuple):
    """A picture to begin with, as it is or as latents.

    Attributes:
        denoise: how much of it is drawn anew, above 0 to 1.
        image: IMAGE, [B, H, W, C] in [0, 1].
        samples: those of a LATENT, [B, 16, h, w], in place of an image.
    """

    denoise: float
    image: Tensor | None = None
    samples: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what is drawn from it, in pixels, multiples of 16."""
        if self.samples is not None:
            height, width = (8 * side for side in self.samples.shape[-2:])
        else:
            assert self.image is not None
            _, height, width, _ = self.image.shape
        return max(width // 16, 1) * 16, max(height // 16, 1) * 16

    @property
    def pictures(self) -> int:
        """How many pictures it is."""
        return len(self.image if self.samples is None else self.samples)  # type: ignore[arg-type]


def init_from_inputs(image: Tensor | None, latent: dict | None, denoise: float) -> InitImage | None:
    """What a sampler node was given to begin with.

    Raises:
        ValueError: both, a LATENT of another model, or one with a mask, which is inpainting.
    """
    if image is not None and latent is not None:
        raise ValueError("both an image and a latent to begin with: disconnect one")
    if latent is None:
        return None if image is None else InitImage(denoise, image=images(image))
    if not isinstance(latent, dict) or not isinstance(latent.get("samples"), Tensor):
        raise ValueError(f"latent is a {type(latent).__name__}; expected a LATENT: connect a node's output")
    if "noise_mask" in latent:
        raise ValueError("the Sampler does not inpaint: take InstantCharacter Apply and KSampler for a masked latent")
    samples = latent["samples"]
    if samples.ndim != 4 or samples.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"the latent is {list(samples.shape)}; expected [batch, {LATENT_CHANNELS}, height, width]")
    return InitImage(denoise, samples=samples)


class Drawing(NamedTuple):
    """What was drawn: IMAGE, [B, H, W, 3] in [0, 1], and the samples of a LATENT, [B, 16, h, w]."""

    image: Tensor
    samples: Tensor


class FluxWeights(nn.ModuleList):
    """What stays on the GPU of a pipeline, under a name that says so in ComfyUI's log."""


class HostedPipeline:
    """A pipeline that ComfyUI gives room to: what is behind a FLUX_PIPE, see :class:`StyledPipeline`.

    Args:
        pipeline: on the CPU, its LoRAs loaded.
        strategy: what stays on the GPU, see :meth:`CharacterPipelineMixin.enable_character_offload`.
        vram_gb: GiB of GPU memory to use at the most; what ComfyUI has, if 0.
        compiled: whether torch is to compile FLUX's blocks.
    """

    def __init__(
        self, pipeline: InstantCharacterPipeline, strategy: Strategy, vram_gb: float = 0.0, compiled: bool = False
    ) -> None:
        self.pipeline = pipeline
        pipeline.set_progress_bar_config(disable=True)
        self._device = management.get_torch_device()
        self._strategy = strategy
        self._vram_gb = vram_gb
        self._compiled = compiled
        self._adapter: HostedAdapter | None = None
        self._placed: tuple | None = None
        self._staying: Any = None
        self._lora_strength: float | None = None

    def draw(
        self,
        character: HostedCharacter | None,
        prompt: Prompt,
        size: tuple[int, int],
        steps: int,
        seed: int,
        start: InitImage | None = None,
        batch_size: int = 1,
        *,
        lora_strength: float = 1.0,
        **settings: Any,
    ) -> Drawing:
        """Draw.

        Args:
            character: who, if anybody.
            prompt: what.
            size: width and height in pixels, multiples of 16; a start has its own.
            steps: that are run, whatever of a start is drawn anew.
            seed: of the noise, which is drawn on the CPU: the same on every machine.
            start: a picture to begin with.
            batch_size: pictures at once; as many as a start has, if it has several.
            lora_strength: how strongly the LoRAs are applied, if there are any.
            settings: of the library's pipeline.

        Raises:
            ValueError: what the pipeline refuses, or a prompt in words where no text encoders were loaded.
        """
        self._arrange(character)
        self._apply_loras(lora_strength)
        settings |= self._text(prompt)
        pipeline, begin = self._begin(start, steps)
        width, height = size if start is None else start.size
        watch = _Watch(width, height, steps)
        try:
            image = pipeline(
                subject_image=None if character is None else character.character,
                width=width,
                height=height,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
                return_dict=False,
                num_images_per_prompt=batch_size if start is None or start.pictures == 1 else start.pictures,
                callback_on_step_end=watch,
                **begin,
                **settings,
            )[0]
        finally:
            self.pipeline.maybe_free_model_hooks()
        return Drawing(image.permute(0, 2, 3, 1).float().cpu(), watch.samples.float().cpu())

    def _arrange(self, character: HostedCharacter | None) -> None:
        """The character's adapter in FLUX, the weights where the plan has them, and room for what comes beside."""
        adapter = self._adapter if character is None else character.adapter
        if adapter is not self._adapter and adapter is not None:
            self.pipeline.disable_character_offload()  # planned anew below, once ComfyUI has unloaded what it can
            self.pipeline.set_character_adapter(adapter.adapter, self._device)
            self.pipeline.adapter_host = self._adapter = adapter
        if self.pipeline.offloader is None:  # after the adapter, which would have the weights pinned twice
            self._offload()
        offloader = self.pipeline.offloader
        assert offloader is not None
        plan = offloader.plan
        placed = offloader, plan.resident_components, plan.streamed
        if placed != self._placed:  # the first, or one that larger pictures or lack of memory brought
            if self._staying:
                release(self._staying)
            staying = offloader.resident_modules()
            self._staying = hosted(FluxWeights(staying)) if staying else None
            self._placed = placed
        beside = plan.predicted_peak - plan.resident
        if self._staying:
            load(self._staying, beside)
        else:
            management.free_memory(beside, self._device)

    def _offload(self) -> None:
        """Have the library plan with what memory ComfyUI has when nothing else of it is loaded."""
        management.unload_all_models()
        has = (management.get_free_memory(self._device) - management.extra_reserved_memory()) / GIB
        vram_gb = min(has, self._vram_gb) if self._vram_gb else has
        plan = self.pipeline.enable_character_offload(self._strategy, vram_gb, self._device)
        logger.info("InstantCharacter's memory plan is %s", plan)
        if self._compiled:
            self.pipeline.enable_character_compile()

    def _apply_loras(self, strength: float) -> None:
        """A number in each of their layers: nothing is loaded, planned or, where words do not change, encoded anew."""
        names = {name for names in self.pipeline.get_list_adapters().values() for name in names}
        if names and strength != self._lora_strength:
            self.pipeline.set_adapters(sorted(names), [strength] * len(names))
            self._lora_strength = strength

    def _text(self, prompt: Prompt) -> dict[str, Any]:
        """The pipeline's settings for a prompt; the negative one only where it counts."""
        told = {"": prompt.positive, **({"negative_": prompt.negative} if prompt.true_cfg > 1 else {})}
        settings: dict[str, Any] = {"true_cfg_scale": prompt.true_cfg}
        for name, text in told.items():
            if isinstance(text, str) and None in (self.pipeline.text_encoder, self.pipeline.text_encoder_2):
                raise ValueError("this FLUX_PIPE has no text encoders: load them, or connect a CONDITIONING")
            settings |= {f"{name}prompt": text} if isinstance(text, str) else self._embeddings(name, text)
        return settings

    def _embeddings(self, name: str, conditioning: Conditioning) -> dict[str, Any]:
        if len(conditioning) != 1 or conditioning[0][1].get("pooled_output") is None:
            raise ValueError(
                "the Sampler takes a CONDITIONING of one prompt for FLUX; combined, timed and regional ones need the "
                "native way: InstantCharacter Apply and KSampler"
            )
        text, extra = conditioning[0]
        where = {"device": self._device, "dtype": compute_dtype(self.pipeline.transformer)}
        return {
            f"{name}prompt_embeds": text.to(**where),
            f"{name}pooled_prompt_embeds": extra["pooled_output"].to(**where),
        }

    def _begin(self, start: InitImage | None, steps: int) -> tuple[Any, dict[str, Any]]:
        """The pipeline to run, and its settings for what it begins with."""
        if start is None:
            return self.pipeline, {"num_inference_steps": steps}
        if not 0 < start.denoise <= 1:
            raise ValueError(f"denoise is {start.denoise}; expected above 0 to 1")
        other = InstantCharacterImg2ImgPipeline(**self.pipeline.components)  # the same models
        other.set_progress_bar_config(disable=True)
        other.share_character_adapter(self.pipeline)
        of_all = max(int(steps / start.denoise), steps)
        if start.samples is not None:
            image = comfy.latent_formats.Flux().process_in(start.samples)
        else:
            assert start.image is not None
            image = start.image[..., :3].movedim(-1, 1)
        strength = (steps - 1e-3) / of_all  # diffusers rounds the steps that it leaves out down
        return other, {"image": image, "num_inference_steps": of_all, "strength": strength}


class StyledPipeline(NamedTuple):
    """A FLUX_PIPE: a pipeline, which others may draw through as well, and how strongly its LoRA counts in this one."""

    hosted: HostedPipeline
    lora_strength: float = 1.0

    def draw(self, *args: Any, **settings: Any) -> Drawing:
        """See :meth:`HostedPipeline.draw`."""
        return self.hosted.draw(*args, lora_strength=self.lora_strength, **settings)


class LastPipeline:
    """The pipeline that was loaded last, and what it was made of: kept for as long as somebody holds this."""

    def __init__(self) -> None:
        self._made_of: Hashable = None
        self._pipeline: HostedPipeline | None = None

    def get(self, made_of: Hashable, load: Callable[[], HostedPipeline]) -> HostedPipeline:
        """The pipeline of these files and settings: the last one, or else one that is loaded once that has gone."""
        if self._pipeline is None or made_of != self._made_of:
            self._pipeline = None
            gc.collect()  # a pipeline that has drawn is part of cycles
            self._pipeline, self._made_of = load(), made_of
        return self._pipeline


_last: weakref.ref[LastPipeline] | None = None


def last_pipeline() -> LastPipeline:
    """The one that all Load FLUX nodes of a workflow hold, and that goes with them.

    ComfyUI lets go of what a node gave before it runs it with another setting. The node itself it keeps until the
    workflow has it no more, or memory is freed.
    """
    global _last
    last = (_last and _last()) or LastPipeline()
    _last = weakref.ref(last)
    return last


class _Watch:
    """Called after each step: shows how far it is and what is seen so far, cancels, and keeps the latents."""

    def __init__(self, width: int, height: int, steps: int) -> None:
        self.samples = torch.empty(0)
        self._rows, self._columns = height // 16, width // 16  # of image tokens
        self._steps = steps
        self._bar = comfy.utils.ProgressBar(steps)
        self._format = comfy.latent_formats.Flux()
        self._previewer = latent_preview.get_previewer(management.get_torch_device(), self._format)
        self._before: Tensor | None = None

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        management.throw_exception_if_processing_interrupted()
        latents = tensors["latents"]
        self._bar.update_absolute(step + 1, self._steps, self._preview(pipeline, latents))
        self._before = latents
        if step + 1 >= pipeline.num_timesteps:
            self.samples = self._format.process_out(self._unpack(latents))
        return {}

    def _preview(self, pipeline: Any, latents: Tensor) -> Any:
        """The picture that the last two latents point to, from the second step on; of FLUX's own latents only."""
        if self._previewer is None or self._before is None or latents.shape[-1] != 4 * LATENT_CHANNELS:
            return None
        sigmas, now = pipeline.scheduler.sigmas, pipeline.scheduler.step_index
        velocity = (latents - self._before) / (sigmas[now] - sigmas[now - 1])
        seen = self._unpack(latents - sigmas[now] * velocity)
        return self._previewer.decode_latent_to_preview_image("JPEG", seen.float())

    def _unpack(self, latents: Tensor) -> Tensor:
        """FLUX's tokens, [B, S, 64], as latents, [B, 16, h, w]."""
        return unpack(latents, self._rows, self._columns)
