"""diffusers' FLUX pipelines, with characters in the pictures."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, get_args

import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from torch import Tensor

from ..character.encoders import CharacterEncoder
from ..character.tokens import TokenCache
from ..files.pictures import Picture, ResizeMode, open_picture
from ..model.adapter import CharacterAdapter
from ..model.character import Character
from ..model.strength import Scale
from ..offload.streaming import on_device
from ..values import check_choice
from ..versions import warn_if_newer
from .attn_processor import attach, attached, check_fits, detach
from .finite import finite_predictions
from .first_block_cache import check_threshold, first_block_cache
from .hooks import cache_contexts, drop_empty_registry
from .memory import MemoryMixin
from .parallel import context_parallel, same_pictures
from .schedule import (
    Conditioning,
    SubjectImage,
    SubjectMask,
    add_conditionings,
    check_window,
    open_subjects,
    pair_subjects,
)
from .settings import bind, check_settings, prompt_length, side
from .shared import AdapterHost


class CharacterPipelineMixin(MemoryMixin):
    """Adds characters to the pictures of a diffusers FLUX pipeline that follows it in a class's bases.

    Its arguments come on top of the pipeline's; the pipeline's own code is called, not copied.
    """

    # Adapter and encoder

    def set_character_adapter(self, adapter: CharacterAdapter, device: str | torch.device | None = None) -> None:
        """Attach an adapter to the transformer, in its dtype and on its device; set it again if its weights change.

        Args:
            adapter: the adapter. One that is refused leaves the one before in its place.
            device: where it is folded, see :mod:`~instantcharacter.model.folding`; if not given, the GPU that the
                pipeline is on, or else :func:`~.default_device`.

        Raises:
            ValueError: an adapter for a transformer of another width or number of blocks.
        """
        check_fits(self.transformer, adapter)
        compute_on = self._device_or_own(device)
        warn_if_newer("diffusers")
        with self._changing():
            attach(self.transformer, adapter, compute_on=compute_on)
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
        with self._changing():
            detach(self.transformer)
            self._state.adapter = self._state.tokens = None
            self._state.characters.clear()

    def set_character_encoder(self, encoder: CharacterEncoder | None) -> None:
        """Set the encoder of reference pictures; it is not needed for :class:`Character` objects."""
        with self._changing():
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
        check_choice("fit", fit, get_args(ResizeMode))
        image = open_picture(picture)
        with self._turns.one():
            encoder, adapter = self._encoder_and_adapter()

            def create() -> Character:
                with on_device(encoder, self._execution_device):
                    features = encoder(image, fit)
                with on_device(adapter.projector, self._execution_device):
                    return adapter.create_character(features, picture=image)

            return self._state.characters.get(image, fit, create)

    def clear_cache(self) -> None:
        """Drop the cached characters of recent pictures, and the embeddings of recent prompts."""
        self._state.characters.clear()
        self._state.prompts.clear()

    # Generating

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode prompts as the diffusers pipeline does; results are cached, so that other seeds need no text encoder.

        A prompt is never longer than :func:`~.settings.prompt_length`, whatever ``max_sequence_length`` is.
        """
        encode = super().encode_prompt
        call = inspect.signature(encode).bind(*args, **kwargs)
        call.apply_defaults()
        if self.tokenizer_2 is not None:
            call.arguments["max_sequence_length"] = prompt_length(self, call.arguments["max_sequence_length"])
        encoders = self.text_encoder, self.text_encoder_2
        with self._turns.one():
            return self._state.prompts.encode(encode, call, encoders, self._execution_device)

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
        """Generate; the arguments are those of the diffusers pipeline, and these. All are checked before it begins.

        Threads take turns: one generates with a transformer, or changes it by the methods of this class, and the others
        wait. A callback of the run may call what changes nothing that the run relies on.

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
            ValueError: a setting of another type, shape or range than expected, see :mod:`.settings`; settings that
                contradict each other; a second cache, an empty list or mask; no adapter or encoder, or a character of
                another adapter; at the end, predictions that are not finite.
            RuntimeError: called by a callback of its own run.
        """
        call = bind(super().__call__, args, kwargs)
        check_settings(self, call.arguments)
        check_window(subject_start, subject_end)
        check_choice("subject_fit", subject_fit, get_args(ResizeMode))
        check_threshold(self.transformer, cache_threshold)
        subjects = open_subjects(pair_subjects(subject_image, subject_scale, subject_mask))
        with self._turns.generating():
            characters = self._characters([picture for picture, *_ in subjects], subject_fit)
            conditionings = [
                Conditioning(character, scale, mask)
                for character, (_, scale, mask) in zip(characters, subjects, strict=True)
            ]
            window = (subject_start, subject_end)
            flux = self.transformer
            conditioned = add_conditionings(flux, self.scheduler, conditionings, window, self._tokens)
            cached = first_block_cache(flux, self.scheduler, cache_threshold)
            checked, same = finite_predictions(flux), same_pictures(flux)
            retries = context_parallel(flux) is None
            try:
                with checked, conditioned if conditionings else nullcontext(), cached, cache_contexts(flux), same:
                    return self._state.offload.run(super().__call__, call.args, call.kwargs, side(self, None), retries)
            finally:
                drop_empty_registry(flux)

    def _attached_adapter(self) -> CharacterAdapter:
        """The adapter, if the transformer still carries it: other pipelines may have attached theirs."""
        if self.character_adapter is None or attached(self.transformer) != self._state.fingerprint:
            raise ValueError(
                "this pipeline's transformer does not carry its character adapter: call set_character_adapter"
            )
        return self.character_adapter

    def _characters(self, pictures: Sequence[Picture | Character], fit: ResizeMode) -> list[Character]:
        """The pictures' characters, and those that there are; all are checked before one is made."""
        for picture in pictures:
            if isinstance(picture, Character):
                self._attached_adapter()
                picture.check_made_by(self._state.fingerprint)
            else:
                self._encoder_and_adapter()
        return [each if isinstance(each, Character) else self.create_character(each, fit) for each in pictures]

    def _encoder_and_adapter(self) -> tuple[CharacterEncoder, CharacterAdapter]:
        """What makes characters."""
        adapter, encoder = self._attached_adapter(), self.character_encoder
        adapter.check_whole("make a character")
        if encoder is None:
            raise ValueError("no character encoder: call set_character_encoder, or pass a Character for the picture")
        return encoder, adapter

    def _tokens(
        self, character: Character, timesteps: Sequence[float], device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        cache, request = self._state.tokens, (character, timesteps, device, dtype)
        assert cache is not None, "it is set with the adapter"
        host = None if cache.has(*request) else self.adapter_host
        with host.resampling(device) if host else nullcontext():
            return cache.tokens(*request)


class InstantCharacterPipeline(CharacterPipelineMixin, FluxPipeline):
    """Text to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterImg2ImgPipeline(CharacterPipelineMixin, FluxImg2ImgPipeline):
    """Image to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterInpaintPipeline(CharacterPipelineMixin, FluxInpaintPipeline):
    """Inpainting, see :class:`CharacterPipelineMixin`."""
