"""diffusers' FLUX pipelines, with characters in the pictures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from torch import Tensor

from ..character.encoders import CharacterEncoder
from ..character.tokens import TokenCache
from ..files.pictures import Picture, ResizeMode, open_picture
from ..model.adapter import CharacterAdapter
from ..model.character import Character
from ..model.strength import Scale, has_effect
from ..offload.devices import default_device
from ..offload.offloader import Offloader
from ..offload.planning import MemoryPlan, Strategy
from ..offload.sizes import ComponentModules
from ..offload.streaming import on_device
from ..versions import warn_if_newer
from .attn_processor import attach, attached, check_fits, compute_dtype, detach
from .compile import compile_blocks
from .components import components_of
from .first_block_cache import first_block_cache
from .fp8 import check_fp8_arithmetic, compute_in_fp8
from .hooks import cache_contexts, drop_empty_registry
from .model_changes import ModelChangesMixin
from .offloading import OffloadRequest
from .schedule import Conditioning, SubjectImage, SubjectMask, add_conditionings, check_window, pair_subjects
from .shared import AdapterHost, SharedState

SCHNELL_T5_LENGTH = 256
"""The most T5 tokens of a prompt for FLUX.1-schnell."""


class CharacterPipelineMixin(ModelChangesMixin):
    """Adds characters to the pictures of a diffusers FLUX pipeline that follows it in a class's bases.

    Its arguments come on top of the pipeline's; the pipeline's own code is called, not copied.
    """

    _first: CharacterPipelineMixin | None = None
    """The pipeline that this one shares its state with."""

    @cached_property
    def _state(self) -> SharedState:
        return SharedState()

    # Adapter and encoder

    def set_character_adapter(self, adapter: CharacterAdapter, device: str | torch.device | None = None) -> None:
        """Attach an adapter to the transformer, in its dtype and on its device; set it again if its weights change.

        Args:
            adapter: the adapter. One that is refused leaves the one before in its place.
            device: where it is folded, see :mod:`~instantcharacter.model.folding`; :func:`~.default_device` if not
                given.

        Raises:
            ValueError: an adapter for a transformer of another width or number of blocks.
        """
        check_fits(self.transformer, adapter)
        warn_if_newer("diffusers")
        with self._offload_suspended():
            attach(self.transformer, adapter, compute_on=torch.device(device or default_device()))
            self._state.adapter = adapter
            self._state.tokens = TokenCache(adapter.projector)
        self._state.fingerprint = attached(self.transformer)
        self._state.characters.clear()

    def share_character_adapter(self, other: CharacterPipelineMixin) -> None:
        """Share all state with a pipeline of the same models: adapter, encoder, caches, and one offloader.

        Whatever is set, cached or offloaded through either pipeline is so for both. The other pipeline lives for as
        long as this one.
        """
        self._first = other._first or other
        self._state = other._state

    def remove_character_adapter(self) -> None:
        """Make this a plain FLUX pipeline again."""
        with self._offload_suspended():
            detach(self.transformer)
            self._state.adapter = self._state.tokens = None
        self._state.characters.clear()

    def set_character_encoder(self, encoder: CharacterEncoder | None) -> None:
        """Set the encoder of reference pictures; it is not needed for :class:`Character` objects."""
        with self._offload_suspended():
            self._state.encoder = encoder
        self._state.characters.clear()

    @property
    def character_adapter(self) -> CharacterAdapter | None:
        """The adapter that :meth:`set_character_adapter` set."""
        return self._state.adapter

    @property
    def character_encoder(self) -> CharacterEncoder | None:
        """The encoder that :meth:`set_character_encoder` set."""
        return self._state.encoder

    @property
    def adapter_host(self) -> AdapterHost | None:
        """Manages the adapter's weights in place of this pipeline's offloading; None if the pipeline does."""
        return self._state.host

    @adapter_host.setter
    def adapter_host(self, host: AdapterHost | None) -> None:
        self._state.host = host

    def create_character(self, picture: Picture, fit: ResizeMode = "pad") -> Character:
        """Make a character of a reference picture, on the pipeline's device; characters of recent pictures are cached.

        Encoder and projector are on that device only while they compute, unless they are resident there.

        Args:
            picture: anything that :func:`~instantcharacter.files.pictures.open_picture` takes.
            fit: how it becomes a square: ``"pad"`` with white, or ``"stretch"``.

        Raises:
            ValueError: not a picture, no adapter or encoder set, or a folded adapter.
        """
        adapter, encoder = self._attached_adapter(), self.character_encoder
        adapter.check_whole("make a character")
        if encoder is None:
            raise ValueError("no character encoder: call set_character_encoder, or pass a Character for the picture")
        image = open_picture(picture)

        def create() -> Character:
            with on_device(encoder, self._execution_device):
                features = encoder(image, fit)
            with on_device(adapter.projector, self._execution_device):
                return adapter.create_character(features, picture=image)

        return self._state.characters.get(image, fit, create)

    # Memory and speed

    @property
    def offloader(self) -> Offloader | None:
        """The offloader of :meth:`enable_character_offload`; None if it is not enabled."""
        return self._state.offload.offloader

    def enable_character_offload(
        self, strategy: Strategy = "auto", vram_gb: float | None = None, device: str | torch.device | None = None
    ) -> MemoryPlan:
        """Keep on the GPU the weights that fit, and move the others there when they are needed.

        It takes the place of diffusers' offloading. The plan follows changes of the pipeline: another adapter or
        encoder, LoRAs, larger pictures. If the GPU is out of memory all the same, the module that failed is run again
        under the next smaller plan, with a warning.

        Args:
            strategy: ``"auto"``: as many weights stay on the GPU as fit. ``"none"``: all. ``"stream"``: as few as
                streaming can. ``"model"``: one model at a time, by diffusers. ``"sequential"``: one layer at a time,
                by accelerate: the least memory, and by far the slowest.
            vram_gb: GiB of GPU memory to use at most; all that is free now, but for what a desktop needs, if not given.
            device: where to run; :func:`~.default_device` if not given. On a Mac, whose GPU computes in host memory,
                all weights stay.

        Returns:
            The plan; print it.

        Raises:
            ValueError: another strategy, or too little memory for any plan.
            RuntimeError: another pipeline offloads the same models, and does not share its state with this one.
            torch.OutOfMemoryError: not even the smallest plan's weights fit; nothing is offloaded then.
        """
        request = OffloadRequest(strategy, vram_gb, torch.device(device or default_device()))
        return self._state.offload.enable(self._first or self, self._components(), request)

    def disable_character_offload(self) -> None:
        """Leave the weights where they are now."""
        self._state.offload.disable()

    def enable_character_compile(self) -> bool:
        """Have torch compile FLUX's blocks, with the character in them, at their first run; see :mod:`.compile`.

        Returns:
            Whether they will be; a warning says why not. If compiling fails later, a warning says so, and FLUX runs
            without it.
        """
        return compile_blocks(self.transformer)

    def enable_character_fp8(self, device: str | torch.device | None = None) -> None:
        """Have FLUX's large layers multiply in 8 bits, and the character's; it cannot be undone.

        Half of the memory for these layers; steps are faster above all with :meth:`enable_character_compile`, and
        pictures are slightly different. LoRAs, adapters and offloading may come before or after it.

        Args:
            device: where FLUX is to run; :func:`~.default_device` if not given.

        Raises:
            ValueError: the device has no 8-bit arithmetic, or FLUX is quantised or offloaded by others.
        """
        device = torch.device(device or default_device())
        by_rows = check_fp8_arithmetic(device)
        with self._offload_suspended():
            compute_in_fp8(self.transformer, compute_dtype(self.transformer), by_rows, device)

    def clear_cache(self) -> None:
        """Drop the cached characters of recent pictures, and the embeddings of recent prompts."""
        self._state.characters.clear()
        self._state.prompts.clear()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or convert the models, as the diffusers pipeline does.

        It ends the offloading of :meth:`enable_character_offload`, but for ``"model"`` and ``"sequential"``, which
        are diffusers' own and follow its rules.
        """
        if self.offloader and self.offloader.retries_module:
            self.disable_character_offload()
        return super().to(*args, **kwargs)

    def maybe_free_model_hooks(self) -> None:
        """Move models that diffusers offloads to host memory, as the diffusers pipeline does after each call."""
        super().maybe_free_model_hooks()
        drop_empty_registry(self.transformer)

    @property
    def _execution_device(self) -> torch.device:
        return self.offloader.device if self.offloader else super()._execution_device

    def _components(self) -> ComponentModules:
        adapter = None if self.adapter_host else self.character_adapter
        return components_of(self, self.character_encoder, adapter)

    def _offload_suspended(self) -> AbstractContextManager[None]:
        """Context manager in which the models may be changed; afterwards they are offloaded as before."""
        return self._state.offload.suspended(self._first or self, self._components)

    @contextmanager
    def models_changing(self) -> Iterator[None]:
        """Context manager in which the models may be changed; afterwards they are offloaded as before."""
        self._state.prompts.clear()
        with self._offload_suspended():
            yield

    # Generating

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the diffusers pipeline does; results are cached, so that other seeds need no text encoder.

        A prompt is never longer than T5's tokenizer allows, and for FLUX.1-schnell, which has no guidance embedding, no
        longer than the 256 tokens that it learned with, whatever ``max_sequence_length`` is.
        """
        encode = super().encode_prompt
        call = inspect.signature(encode).bind(*args, **kwargs)
        call.apply_defaults()
        if self.tokenizer_2 is not None:
            asked, guided = call.arguments["max_sequence_length"], self.transformer.config.guidance_embeds
            longest = self.tokenizer_2.model_max_length if guided else SCHNELL_T5_LENGTH
            call.arguments["max_sequence_length"] = min(asked, longest, self.tokenizer_2.model_max_length)
        return self._state.prompts.encode(
            encode, call, (self.text_encoder, self.text_encoder_2), self._execution_device
        )

    def __call__(
        self,
        *args: Any,
        subject_image: SubjectImage = None,
        subject_scale: Scale | Sequence[Scale] = 0.9,
        subject_mask: SubjectMask = None,
        subject_fit: ResizeMode = "pad",
        subject_start: float = 0.0,
        subject_end: float = 1.0,
        cache_threshold: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Generate; the arguments are those of the diffusers pipeline, and these.

        Args:
            subject_image: the character: a picture, a :class:`Character`, or a list of either for several in one
                picture. Without one this is the plain pipeline.
            subject_scale: the character's strength, about 0.6 to 1; a smaller one leaves more to the prompt, 0 is
                plain FLUX; or a :class:`Strength`, which changes over the steps. One for all, or one for each.
            subject_mask: where in the picture the character may be: a picture or array of any size, white there. One
                for all, or a list with one (or None) for each; everywhere if not given.
            subject_fit: how a reference picture becomes a square: ``"pad"`` with white, or ``"stretch"``.
            subject_start, subject_end: fractions of the steps, 0 to 1, between which the characters take part.
            cache_threshold: above 0, FLUX's blocks after the first are left out of the steps in which their effect can
                be predicted within about this fraction, see :mod:`.first_block_cache`; 0.12 leaves out about 17 of 28
                steps. 0 computes every step.

        Raises:
            ValueError: a negative threshold or a second cache, an empty list or mask, scales that are not finite,
                scales or masks that are not one a character, start past end, no adapter or encoder, or a character of
                another adapter.
        """
        check_window(subject_start, subject_end)
        if kwargs.get("num_images_per_prompt", 1) is None:  # diffusers allows it, and multiplies by it
            del kwargs["num_images_per_prompt"]
        conditionings = [
            Conditioning(self._character(picture, subject_fit), scale, mask)
            for picture, scale, mask in pair_subjects(subject_image, subject_scale, subject_mask)
            if has_effect(scale)
        ]
        default_side = self.default_sample_size * self.vae_scale_factor
        window = (subject_start, subject_end)
        conditioned = add_conditionings(self.transformer, self.scheduler, conditionings, window, self._tokens)
        cached = first_block_cache(self.transformer, self.scheduler, cache_threshold)
        try:
            with conditioned if conditionings else nullcontext(), cached, cache_contexts(self.transformer):
                return self._state.offload.run(super().__call__, args, kwargs, default_side)
        finally:
            drop_empty_registry(self.transformer)

    def _attached_adapter(self) -> CharacterAdapter:
        """The adapter, if the transformer still carries it: other pipelines may have attached theirs."""
        if self.character_adapter is None or attached(self.transformer) != self._state.fingerprint:
            raise ValueError(
                "this pipeline's transformer does not carry its character adapter: call set_character_adapter"
            )
        return self.character_adapter

    def _character(self, picture: Picture | Character, fit: ResizeMode) -> Character:
        if not isinstance(picture, Character):
            return self.create_character(picture, fit)
        self._attached_adapter()
        picture.check_made_by(self._state.fingerprint)
        return picture

    def _tokens(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        cache, request = self._state.tokens, (character, timesteps, device, dtype)
        assert cache is not None, "it is set with the adapter"
        host = None if cache.has(*request) else self.adapter_host
        with host.resampling() if host else nullcontext():
            return cache.tokens(*request)


class InstantCharacterPipeline(CharacterPipelineMixin, FluxPipeline):
    """Text to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterImg2ImgPipeline(CharacterPipelineMixin, FluxImg2ImgPipeline):
    """Image to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterInpaintPipeline(CharacterPipelineMixin, FluxInpaintPipeline):
    """Inpainting, see :class:`CharacterPipelineMixin`."""
