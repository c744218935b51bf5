"""A first-block cache: steps of which only FLUX's first block is computed, the others' effect being predicted.

What the blocks after the first add to the image tokens changes smoothly from step to step, and so does what the first
block adds. Both are extrapolated from the last two steps that were computed. If the first block's own change is close
to its prediction, the rest of the step is taken from the other prediction.

The decision is that of First Block Cache (ParaAttention, diffusers), which compares with the last computed step; its
prediction by a line is TaylorSeer's (arXiv 2503.06923), of first order. Together they left out more at the same error
than either; ``benchmarks/RESULTS.md`` compares them. Blocks that are left out are not called, so that their weights are
not streamed either; diffusers' caches replace the ``forward`` of each block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ..values import check_number
from .parallel import sum_of_parts
from .schedule import current_step

THRESHOLD = 0.12
"""A threshold at which toy pictures keep their meaning: identity, action and scene."""
MAX_LEFT_OUT = 3
"""Steps that are left out one after another at most."""


@contextmanager
def first_block_cache(transformer: FluxTransformer2DModel, scheduler: Any, threshold: float) -> Iterator[None]:
    """Context manager in which a transformer leaves out the blocks after the first where their effect is predictable.

    Its state is that of one run of a pipeline: no picture takes over anything from another one. Of prompt and negative
    prompt, each has a state of its own.

    Args:
        transformer: of a pipeline that calls it with ``encoder_hidden_states`` by keyword, without ControlNet.
        scheduler: of the pipeline; it counts the steps on the host.
        threshold: how far the first block's change may be from its prediction, as a fraction of the change, for a
            step to be left out; of every picture of a batch. 0 leaves out none, infinity as many as
            :data:`MAX_LEFT_OUT` allows.

    Raises:
        ValueError: a threshold below 0, or a transformer with one of diffusers' caches or compiled as a whole.
    """
    check_threshold(transformer, threshold)
    if threshold == 0:
        yield
        return
    run = _Run(scheduler, threshold, partial(sum_of_parts, transformer=transformer))
    blocks = {name: list(getattr(transformer, name)) for name in ("transformer_blocks", "single_transformer_blocks")}
    handles = [
        transformer.register_forward_pre_hook(run.before_call, with_kwargs=True),
        transformer.register_forward_hook(run.after_call),
    ]
    # In place of the module lists, for as long as these attributes hide them, FLUX's forward iterates over these lists.
    vars(transformer).update(
        transformer_blocks=[_FirstBlocks(run, blocks["transformer_blocks"])],
        single_transformer_blocks=[_LastBlocks(run, blocks["single_transformer_blocks"])],
    )
    try:
        yield
    finally:
        for name in blocks:
            del vars(transformer)[name]
        for handle in handles:
            handle.remove()


def check_threshold(transformer: FluxTransformer2DModel, threshold: float) -> None:
    """Raise ``ValueError`` for a threshold, or a transformer, that :func:`first_block_cache` does not take."""
    check_number("cache_threshold", threshold, 0, math.inf)
    if threshold == 0:
        return
    if hasattr(transformer, "_orig_mod"):
        raise ValueError(
            "the transformer was compiled as a whole, in which no block can be left out: call enable_character_compile "
            "in place of torch.compile"
        )
    if transformer.is_cache_enabled:
        raise ValueError(
            "the transformer has a cache of diffusers' enabled: call its disable_cache, or leave out cache_threshold"
        )


class _Step(NamedTuple):
    """What the blocks of a computed step add to the image tokens [B, S, C]: the first one, and the others."""

    step: int
    first: Tensor
    rest: Tensor


@dataclass
class _Branch:
    """The state of a run for one prompt.

    Attributes:
        prompt: the embeddings by which the branch is known; kept, so that no other tensor gets their identity.
        computed: the last two computed steps.
        left_out: number of steps that were left out since.
        characters: number of characters in those steps.
    """

    prompt: Tensor
    computed: list[_Step] = field(default_factory=list)
    left_out: int = 0
    characters: int = 0


class _Run:
    """The state of one run of a pipeline; ``over_all`` sums numbers over the processes that share a picture.

    It changes when a call of the transformer has succeeded: a call that is repeated after it ran out of memory starts
    from the same state.
    """

    def __init__(self, scheduler: Any, threshold: float, over_all: Callable[[Tensor], Tensor]) -> None:
        self._scheduler = scheduler
        self._threshold = threshold
        self._over_all = over_all
        self._branches: dict[int, _Branch] = {}
        self._branch: _Branch
        self._step = 0
        self._first: Tensor
        self._after_first: Tensor
        self._rest: Tensor
        self.left_out = False

    def before_call(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a call of the transformer."""
        prompt = kwargs["encoder_hidden_states"]
        subjects = (kwargs.get("joint_attention_kwargs") or {}).get("subjects") or ()
        branch = self._branches.setdefault(id(prompt), _Branch(prompt))
        self._branch, self._step = branch, current_step(self._scheduler)
        again = bool(branch.computed) and self._step <= branch.computed[-1].step
        if again or len(subjects) != branch.characters:  # where a character comes or goes, predictions fail
            branch.computed, branch.left_out = [], 0
        branch.characters = len(subjects)

    def after_first(self, before: Tensor, after: Tensor) -> None:
        """Decide, with the image tokens before and after the first block, whether to leave out the others."""
        self._first, self._after_first = after - before, after
        self.left_out = self._is_predicted()

    def after_all(self, image: Tensor) -> None:
        """Take the image tokens after the last block of a computed step."""
        self._rest = image - self._after_first

    def predict(self, image: Tensor) -> Tensor:
        """The image tokens after the last block of a step that is left out, from those after the first block."""
        return image + self._extrapolate(*(step.rest for step in self._branch.computed))

    def after_call(self, *_: Any) -> None:
        """After a call of the transformer that succeeded."""
        branch = self._branch
        if self.left_out:
            branch.left_out += 1
        else:
            branch.computed = [*branch.computed[-1:], _Step(self._step, self._first, self._rest)]
            branch.left_out = 0
            del self._rest
        del self._first, self._after_first

    def _is_predicted(self) -> bool:
        branch = self._branch
        if len(branch.computed) < 2 or branch.left_out >= MAX_LEFT_OUT:
            return False
        if math.isinf(self._threshold):
            return True
        error = self._first - self._extrapolate(*(step.first for step in branch.computed))
        change, missed = self._over_all(torch.stack([self._first.abs().mean((1, 2)), error.abs().mean((1, 2))]))
        return bool((missed <= self._threshold * change).all())  # here the host waits

    def _extrapolate(self, older: Tensor, newer: Tensor) -> Tensor:
        """A value of this step, on the line through the values of the last two computed steps."""
        first, last = (computed.step for computed in self._branch.computed)
        return torch.lerp(older, newer, (self._step - first) / (last - first))


class _FirstBlocks:
    """The double-stream blocks as one: the first, and the others where they are computed."""

    def __init__(self, run: _Run, blocks: list[nn.Module]) -> None:
        self._run = run
        self._blocks = blocks

    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        first, *others = self._blocks
        before, text = hidden_states, encoder_hidden_states
        text, image = first(hidden_states=before, encoder_hidden_states=text, **inputs)
        self._run.after_first(before, image)
        for block in () if self._run.left_out else others:
            text, image = block(hidden_states=image, encoder_hidden_states=text, **inputs)
        return text, image


class _LastBlocks:
    """The single-stream blocks as one: all of them, or what they and the double-stream blocks would have added."""

    def __init__(self, run: _Run, blocks: list[nn.Module]) -> None:
        self._run = run
        self._blocks = blocks

    def __call__(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        text, image = encoder_hidden_states, hidden_states
        if self._run.left_out:
            return text, self._run.predict(image)
        for block in self._blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, **inputs)
        self._run.after_all(image)
        return text, image
