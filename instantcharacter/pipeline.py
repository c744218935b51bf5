"""diffusers' FLUX pipelines, with a character in the picture."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from torch import Tensor, nn

from .adapter import CharacterAdapter
from .attention import Subject, region
from .character import Character
from .encoders import CharacterEncoder
from .memory import lent
from .processor import attach, attached, detach
from .reference import BLACK, Fit, Picture, open_picture

_Pipeline: Any = FluxPipeline if TYPE_CHECKING else object

SubjectImage: TypeAlias = "Picture | Character | Sequence[Picture | Character] | None"
SubjectMask: TypeAlias = "Picture | Sequence[Picture | None] | None"

RECENT_PICTURES = 4
"""How many pictures' characters a pipeline remembers."""


class CharacterPipelineMixin(_Pipeline):
    """Put before a diffusers FLUX pipeline in a class's bases, it lets that pipeline draw characters.

    Its own settings come on top of the pipeline's; everything else is the pipeline's, which is called, not copied.
    """

    character_adapter: CharacterAdapter | None = None
    character_encoder: CharacterEncoder | None = None
    _fingerprint: str | None = None
    _remembered: OrderedDict[tuple, Character]

    def set_character_adapter(self, adapter: CharacterAdapter) -> None:
        """Put an adapter into the transformer, in its dtype and on its device; set it again if its weights change.

        Raises:
            ValueError: an adapter for a transformer of another width or number of blocks.
        """
        attach(self.transformer, adapter)
        self.character_adapter = adapter
        self._fingerprint = attached(self.transformer)
        self._remembered = OrderedDict()

    def share_character_adapter(self, other: CharacterPipelineMixin) -> None:
        """Take over the adapter of a pipeline with the same transformer, where it is already."""
        self.character_adapter = other.character_adapter
        self._fingerprint = other._fingerprint
        self._remembered = OrderedDict()

    def remove_character_adapter(self) -> None:
        """Make this a plain FLUX pipeline again."""
        detach(self.transformer)
        self.character_adapter = None
        self._remembered = OrderedDict()

    def set_character_encoder(self, encoder: CharacterEncoder | None) -> None:
        """Set what looks at reference pictures; not needed where only :class:`Character` objects are drawn."""
        self.character_encoder = encoder
        self._remembered = OrderedDict()

    def create_character(self, picture: Picture, fit: Fit = "pad") -> Character:
        """Make a character of a reference picture, on the pipeline's device; recent pictures are remembered.

        The encoder and the projector are on that device only for their part of it, unless they are there anyway.

        Args:
            picture: anything :func:`~instantcharacter.reference.open_picture` takes.
            fit: how it becomes a square: ``"pad"`` with white, or ``"stretch"``.

        Raises:
            ValueError: not a picture, or no adapter or encoder set.
        """
        adapter = self._adapter()
        if self.character_encoder is None:
            raise ValueError("no character encoder: call set_character_encoder, or pass a Character for the picture")
        image = open_picture(picture)
        key = (hashlib.blake2b(image.tobytes()).digest(), image.size, fit)
        if key not in self._remembered:
            with lent(self.character_encoder, self._execution_device) as encoder:
                features = encoder(image, fit)
            with lent(adapter.projector, self._execution_device):
                self._remembered[key] = adapter.create_character(features, picture=image)
        self._remembered.move_to_end(key)
        while len(self._remembered) > RECENT_PICTURES:
            self._remembered.popitem(last=False)
        return self._remembered[key]

    def __call__(
        self,
        *args: Any,
        subject_image: SubjectImage = None,
        subject_scale: float | Sequence[float] = 0.9,
        subject_mask: SubjectMask = None,
        subject_fit: Fit = "pad",
        subject_start: float = 0.0,
        subject_end: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Draw; the arguments are those of the diffusers pipeline, and these.

        Args:
            subject_image: the character: a picture, a :class:`Character`, or a list of either for several in one
                picture. Without one this is the plain pipeline.
            subject_scale: how strongly the character is drawn, about 0.6 to 1; less leaves more to the prompt, 0 is
                plain FLUX. One for all, or one for each.
            subject_mask: where in the picture the character may be: a picture or array, white there, of any size. One
                for all, or a list with one (or None) for each; everywhere if not given.
            subject_fit: how a reference picture becomes a square: ``"pad"`` with white, or ``"stretch"``.
            subject_start: fraction of the steps before which the character is left out, 0 to 1.
            subject_end: fraction of the steps after which it is left out, 0 to 1.

        Raises:
            ValueError: an empty list, scales that are not finite, scales or masks that are not one a character, an
                empty mask, start past end, no adapter or encoder set, or a character that another adapter made.
        """
        if not 0 <= subject_start <= subject_end <= 1:
            raise ValueError(
                f"subject_start {subject_start} and subject_end {subject_end}; expected 0 ≤ start ≤ end ≤ 1"
            )
        subjects = [
            _Part(self._character(picture, subject_fit), scale, mask)
            for picture, scale, mask in _cast(subject_image, subject_scale, subject_mask)
            if scale != 0
        ]
        if not subjects:
            return super().__call__(*args, **kwargs)
        with self._drawing(subjects, subject_start, subject_end):
            return super().__call__(*args, **kwargs)

    def _adapter(self) -> CharacterAdapter:
        """The adapter, which the transformer still carries: other pipelines may have set theirs in it."""
        if self.character_adapter is None or attached(self.transformer) != self._fingerprint:
            raise ValueError(
                "this pipeline's transformer does not carry its character adapter: call set_character_adapter"
            )
        return self.character_adapter

    def _character(self, picture: Picture | Character, fit: Fit) -> Character:
        if not isinstance(picture, Character):
            return self.create_character(picture, fit)
        self._adapter()
        picture.check_made_by(self._fingerprint)
        return picture

    @contextmanager
    def _drawing(self, subjects: list[_Part], start: float, end: float) -> Iterator[None]:
        """Within this block, the transformer gets the subjects of the step at every call."""
        schedule: list[list[Subject]] = []

        def add_subjects(transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            latents = kwargs["hidden_states"]
            if not schedule:
                schedule.extend(self._schedule(subjects, start, end, latents, kwargs["img_ids"]))
            joint = dict(kwargs.get("joint_attention_kwargs") or {})
            joint |= {"subjects": schedule[self._step], "image_tokens": latents.shape[1]}
            return args, {**kwargs, "joint_attention_kwargs": joint}

        hook = self.transformer.register_forward_pre_hook(add_subjects, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _schedule(
        self, subjects: list[_Part], start: float, end: float, latents: Tensor, positions: Tensor
    ) -> list[list[Subject]]:
        """The subjects to draw at each step of the scheduler's: the one time that the host waits for the GPU."""
        timesteps = self.scheduler.timesteps.to(latents.dtype).tolist()
        drawn = _window(len(timesteps), self._first_step, start, end)
        schedule: list[list[Subject]] = [[] for _ in timesteps]
        for character, scale, mask in subjects:
            where = None if mask is None else _region(mask, positions).to(latents)
            at = [timesteps[i] for i in drawn]
            tokens = character.tokens(self._adapter().projector, at, latents.device, latents.dtype)
            for step, step_tokens in zip(drawn, tokens):
                schedule[step].append(Subject(step_tokens, scale, where))
        return schedule

    @property
    def _first_step(self) -> int:
        """The index in the schedule that this run began with: above 0 where it began with a picture."""
        return self.scheduler.begin_index or 0

    @property
    def _step(self) -> int:
        """The index in the schedule now, which the scheduler counts on the host."""
        return self._first_step if self.scheduler.step_index is None else self.scheduler.step_index


class InstantCharacterPipeline(CharacterPipelineMixin, FluxPipeline):
    """Text to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterImg2ImgPipeline(CharacterPipelineMixin, FluxImg2ImgPipeline):
    """Image to image, see :class:`CharacterPipelineMixin`."""


class InstantCharacterInpaintPipeline(CharacterPipelineMixin, FluxInpaintPipeline):
    """Inpainting, see :class:`CharacterPipelineMixin`."""


class _Part(NamedTuple):
    """What a character has in one drawing."""

    character: Character
    scale: float
    mask: Picture | None


def _cast(
    subject_image: SubjectImage, subject_scale: float | Sequence[float], subject_mask: SubjectMask
) -> list[tuple[Picture | Character, float, Picture | None]]:
    """The pictures or characters, each with its finite scale and its mask."""
    pictures, scales, masks = _listed(subject_image), _listed(subject_scale), _listed(subject_mask)
    if not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"subject_scale is {subject_scale}; expected finite numbers")
    if subject_image is None:
        return []
    if not pictures or any(picture is None for picture in pictures):
        raise ValueError("subject_image is a list that is empty or has a None in it; expected pictures or characters")
    for name, given in (("subject_scale", scales), ("subject_mask", masks)):
        if len(given) not in (1, len(pictures)):
            raise ValueError(f"{len(given)} {name} for {len(pictures)} characters; expected one for all or one each")
    return list(zip(pictures, scales * len(pictures), masks * len(pictures)))


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _region(mask: Picture, positions: Tensor) -> Tensor:
    """A mask over FLUX's image tokens, whose ``positions`` [..., S, 3] end in row and column."""
    white = np.asarray(open_picture(mask, BLACK).convert("L"), dtype=np.float32) / 255
    rows, columns = (int(positions[..., axis].max()) + 1 for axis in (1, 2))
    return region(torch.from_numpy(white), rows, columns)


def _window(steps: int, first: int, start: float, end: float) -> list[int]:
    """The steps, from ``first`` on, that lie wholly between two fractions of them."""
    count = steps - first
    return [i for i in range(first, steps) if start <= (i - first) / count and (i - first + 1) / count <= end]
