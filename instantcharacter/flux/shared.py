"""What pipelines of the same models share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..character.encoders import CharacterEncoder
from ..character.tokens import TokenCache
from ..model.adapter import CharacterAdapter
from .caches import CharacterCache, PromptCache
from .offloading import PipelineOffload


class AdapterHost(Protocol):
    """Manages an adapter's weights in place of a pipeline's offloading."""

    def resampling(self, device: torch.device) -> AbstractContextManager[Any]:
        """Context manager in which the adapter's resampler is on a device."""


@dataclass(eq=False)
class SharedState:
    """The state of pipelines that share their character adapter, or of a single pipeline.

    Attributes:
        adapter: attached to the transformer.
        fingerprint: of the adapter.
        tokens: of the adapter's characters.
        encoder: of reference pictures.
        host: of the adapter; None if the pipelines offload it.
        offload: of the models.
        characters: of recent pictures.
        prompts: embeddings of recent prompts.
    """

    adapter: CharacterAdapter | None = None
    fingerprint: str | None = None
    tokens: TokenCache | None = None
    encoder: CharacterEncoder | None = None
    host: AdapterHost | None = None
    offload: PipelineOffload = field(default_factory=PipelineOffload)
    characters: CharacterCache = field(default_factory=CharacterCache)
    prompts: PromptCache = field(default_factory=PromptCache)
