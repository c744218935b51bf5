"""InstantCharacter: a character from one picture, drawn by FLUX in new scenes, poses and styles.

The names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .character.encoders import CharacterEncoder
    from .flux.pipeline import (
        InstantCharacterImg2ImgPipeline,
        InstantCharacterInpaintPipeline,
        InstantCharacterPipeline,
    )
    from .model.adapter import CharacterAdapter
    from .model.character import Character
    from .model.config import AdapterConfig
    from .model.features import CharacterFeatures

_HOME = {
    "AdapterConfig": "model.config",
    "CharacterAdapter": "model.adapter",
    "Character": "model.character",
    "CharacterEncoder": "character.encoders",
    "CharacterFeatures": "model.features",
    "InstantCharacterPipeline": "flux.pipeline",
    "InstantCharacterImg2ImgPipeline": "flux.pipeline",
    "InstantCharacterInpaintPipeline": "flux.pipeline",
}

__all__ = [
    "AdapterConfig",
    "Character",
    "CharacterAdapter",
    "CharacterEncoder",
    "CharacterFeatures",
    "InstantCharacterImg2ImgPipeline",
    "InstantCharacterInpaintPipeline",
    "InstantCharacterPipeline",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module(".versions", __name__).pack_version()
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
