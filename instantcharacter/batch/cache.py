"""Characters and embeddings of a job: each is computed once, by one process, and kept in a file that all read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from torch import Tensor

from ..files.fingerprint import content_digest
from ..files.reading import read_safetensors
from ..files.writing import write_safetensors
from ..flux.caches import RecentCache
from ..model.character import Character
from .folder import names_in
from .jobs import Reference, Source

Loras: TypeAlias = tuple[tuple[Source, float], ...]
Embeddings: TypeAlias = dict[str, Tensor]
"""``prompt_embeds`` [1, T, C] and ``pooled_prompt_embeds`` [1, C'] of a prompt."""


class Prompt(NamedTuple):
    """A text to encode, and the LoRAs that act meanwhile: they may change CLIP."""

    text: str
    loras: Loras


class JobCache:
    """The files of a job's characters and embeddings, named by what they are made of.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.characters, self.prompts = folder / "characters", folder / "prompts"
        self._recent: RecentCache[Character] = RecentCache()

    def missing(self, references: Iterable[Reference]) -> list[Reference]:
        """The references whose characters are not there, each once."""
        names = names_in(self.characters)
        return [reference for reference in dict.fromkeys(references) if self._path(reference).name not in names]

    def save(self, reference: Reference, character: Character) -> None:
        """Write the character of a reference."""
        character.save(self._path(reference))

    def character(self, source: Reference | Source) -> Character:
        """The character of a reference that :meth:`save` wrote, or of a character's file."""
        path = source.path if isinstance(source, Source) else self._path(source)
        return self._recent.get(source, lambda: Character.load(path))

    def embeddings(self, prompt: Prompt, encode: Callable[[Prompt], Embeddings]) -> Embeddings:
        """The embeddings of a prompt, computed if they are not there."""
        path = self.prompts / f"{content_digest(repr(prompt))}.safetensors"
        if not path.exists():
            write_safetensors(path, {name: tensor.cpu().contiguous() for name, tensor in encode(prompt).items()})
        return read_safetensors(path, "embeddings of a job")[0]

    def _path(self, reference: Reference) -> Path:
        return self.characters / f"{content_digest(repr(reference))}.safetensors"
