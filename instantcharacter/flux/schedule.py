"""Which characters FLUX's image tokens attend to, at which steps, how strongly, and where in the picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..files.pictures import Picture, open_mask, open_picture
from ..model.character import Character
from ..model.conditioning import Subject, mask_to_tokens
from ..model.strength import Scale, check_scale, has_effect, scales_at
from ..values import is_number, shown
from .parallel import own_part

SubjectImage: TypeAlias = "Picture | Character | Sequence[Picture | Character] | None"
SubjectMask: TypeAlias = "Picture | Sequence[Picture | None] | None"
TokensOf: TypeAlias = Callable[[Character, Sequence[float], torch.device, torch.dtype], Sequence[Tensor]]
"""A character's tokens at each of the timesteps, on a device and in a dtype."""


class Conditioning(NamedTuple):
    """A character in a picture.

    Attributes:
        character: the character.
        scale: its strength, over the steps of the run.
        mask: where it may be, white on black; None for everywhere.
    """

    character: Character
    scale: Scale
    mask: Picture | None = None


def pair_subjects(
    subject_image: SubjectImage, subject_scale: Scale | Sequence[Scale], subject_mask: SubjectMask
) -> list[tuple[Picture | Character, Scale, Picture | None]]:
    """Each picture or character with its scale and its mask.

    Args:
        subject_image: one, or a list; None for none.
        subject_scale: one for all, or a list with one for each.
        subject_mask: one for all, or a list with one (or None) for each.

    Raises:
        ValueError: scales that are not finite, an empty list, or lists of different lengths.
    """
    pictures, scales, masks = as_list(subject_image), as_list(subject_scale), as_list(subject_mask)
    for scale in scales:
        check_scale("subject_scale", scale)
    if subject_image is None:
        return []
    if not pictures or any(picture is None for picture in pictures):
        raise ValueError("subject_image is a list that is empty or has a None in it; expected pictures or characters")
    for name, values in (("subject_scale", scales), ("subject_mask", masks)):
        if len(values) not in (1, len(pictures)):
            raise ValueError(f"{len(values)} {name} for {len(pictures)} characters; expected one for all or one each")
    return list(zip(pictures, scales * len(pictures), masks * len(pictures)))


def open_subjects(
    subjects: Sequence[tuple[Picture | Character, Scale, Picture | None]],
) -> list[tuple[Image.Image | Character, Scale, Image.Image | None]]:
    """Open the pictures and masks of :func:`pair_subjects`, and leave out the characters that change nothing.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: not a picture or a mask, or an empty mask.
    """
    opened = []
    for picture, scale, mask in subjects:
        where = None if mask is None else open_mask(mask)
        if where is not None:
            mask_to_tokens(_white(where), 1, 1)
        opened.append((picture if isinstance(picture, Character) else open_picture(picture), scale, where))
    return [subject for subject in opened if has_effect(subject[1])]


def check_window(start: float, end: float) -> None:
    """Raise ``ValueError`` unless 0 ≤ start ≤ end ≤ 1."""
    if not (is_number(start) and is_number(end)) or not 0 <= start <= end <= 1:
        raise ValueError(f"subject_start {shown(start)} and subject_end {shown(end)}; expected 0 ≤ start ≤ end ≤ 1")


def step_window(steps: int, first: int, start: float, end: float) -> list[int]:
    """The steps of a run that lie wholly between two fractions of it.

    Args:
        steps: number of timesteps in the schedule.
        first: index of the run's first step: above 0 for a run that starts from a picture.
        start: fraction of the run, 0 to 1.
        end: fraction of the run, 0 to 1.

    Returns:
        Indices in the schedule.
    """
    count = steps - first
    return [i for i in range(first, steps) if start <= (i - first) / count and (i - first + 1) / count <= end]


def token_mask(mask: Picture, img_ids: Tensor) -> Tensor:
    """A mask at the resolution of FLUX's image tokens, [1, S, 1].

    Args:
        mask: a picture of any size, white where the character may be.
        img_ids: [..., S, 3], positions of the image tokens; they end in row and column.
    """
    rows, columns = (int(img_ids[..., axis].max()) + 1 for axis in (1, 2))
    return mask_to_tokens(_white(open_mask(mask)), rows, columns)


def _white(mask: Image.Image) -> Tensor:
    """How white each pixel of a mask is, [H, W] in 0 to 1."""
    return torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255)


def schedule_subjects(
    conditionings: Sequence[Conditioning],
    timesteps: Sequence[float],
    steps: Sequence[int],
    latents: Tensor,
    img_ids: Tensor,
    tokens_of: TokensOf,
    first: int = 0,
    part: Callable[[Tensor], Tensor] = lambda tokens: tokens,
) -> list[list[Subject]]:
    """The subjects of every step.

    Args:
        conditionings: the characters.
        timesteps: of the schedule, in [0, 1000].
        steps: indices of the timesteps at which the characters take part.
        latents: [B, S, 64], FLUX's image tokens, whose device and dtype the subjects get.
        img_ids: their positions, see :func:`token_mask`.
        tokens_of: makes a character's tokens.
        first: index of the run's first timestep, see :func:`step_window`.
        part: takes those of [1, S, 1] image tokens that are computed here, see :func:`~.parallel.own_part`.
    """
    count = len(timesteps) - first
    subjects: list[list[Subject]] = [[] for _ in timesteps]
    for character, scale, mask in conditionings:
        where = None if mask is None else part(token_mask(mask, img_ids).to(latents))
        tokens = tokens_of(character, [timesteps[i] for i in steps], latents.device, latents.dtype)
        for step, step_tokens in zip(steps, tokens, strict=True):
            double, single = (torch.tensor(each) for each in scales_at(scale, (step - first) / count))
            subjects[step].append(Subject(step_tokens, double, where, single))
    return subjects


@contextmanager
def add_conditionings(
    transformer: nn.Module,
    scheduler: Any,
    conditionings: Sequence[Conditioning],
    window: tuple[float, float],
    tokens_of: TokensOf,
) -> Iterator[None]:
    """Context manager in which each call of the transformer gets the subjects of the scheduler's current step.

    They are added to ``joint_attention_kwargs``, for the attention processors. The first call makes the subjects of
    all steps; only there does the host wait for the GPU.

    Args:
        transformer: of a pipeline that calls it with ``hidden_states`` and ``img_ids`` by keyword.
        scheduler: of the pipeline; it counts the steps on the host.
        conditionings: the characters.
        window: see :func:`step_window`.
        tokens_of: makes a character's tokens.
    """
    schedule: list[list[Subject]] = []
    part = partial(own_part, transformer=transformer)

    def add_subjects(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        latents = kwargs["hidden_states"]
        if not schedule:
            timesteps = scheduler.timesteps.to(latents.dtype).tolist()
            first = scheduler.begin_index or 0
            steps = step_window(len(timesteps), first, *window)
            inputs = conditionings, timesteps, steps, latents, kwargs["img_ids"], tokens_of
            schedule.extend(schedule_subjects(*inputs, first, part))
        joint = dict(kwargs.get("joint_attention_kwargs") or {})
        joint |= {"subjects": schedule[current_step(scheduler)], "image_tokens": part(latents).shape[1]}
        return args, {**kwargs, "joint_attention_kwargs": joint}

    hook = transformer.register_forward_pre_hook(add_subjects, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def current_step(scheduler: Any) -> int:
    """Index of a scheduler's current step in its schedule; above 0 at the start of a run that starts from a picture."""
    return (scheduler.begin_index or 0) if scheduler.step_index is None else scheduler.step_index


def as_list(value: Any) -> list[Any]:
    """The items of a list or tuple, or the one value."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
